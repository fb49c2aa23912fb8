// Gives the native engine altered files and random calls; tools/fuzz_engine.py builds and runs it.
//
// usage: fuzz_engine INPUTS SEED FILE...

#include "../src/multifire/engine/csrc/engine.cpp"

#include <cstdlib>
#include <limits>
#include <random>
#include <string>

namespace {

typedef std::vector<uint8_t> Bytes;

std::mt19937_64 random_bits;

int64_t below(int64_t end) { return static_cast<int64_t>(random_bits() % static_cast<uint64_t>(end)); }
bool one_in(int64_t n) { return below(n) == 0; }

void check(bool holds, const char* what) {
  if (holds) return;
  std::printf("FAILED: %s (last error: %s)\n", what, multifire_engine_error());
  std::abort();
}

const char* const kTokens[] = {"0",
                               "-1",
                               "1",
                               "3",
                               "8",
                               "9",
                               "129",
                               "1024",
                               "2147483648",
                               "99999999999999999999",
                               "1e308",
                               "1e-400",
                               "null",
                               "true",
                               "[]",
                               "{}",
                               "\"\"",
                               "[[[[",
                               "\\\"",
                               "\\u0000",
                               "\xf0\x9f\x98\x80",
                               "I8",
                               "F32",
                               "I64",
                               "ds_resnet",
                               "ds_resnet8",
                               "ds_resnet14",
                               "shared",
                               "subtract",
                               "any",
                               "zero"};

// Replaces a run of digits or letters of the header by another token.
void replace_token(Bytes& file, size_t header_end) {
  size_t begin = 8 + static_cast<size_t>(below(static_cast<int64_t>(header_end) - 8));
  while (begin < header_end && !std::isalnum(file[begin])) ++begin;
  size_t end = begin;
  while (end < header_end && std::isalnum(file[end])) ++end;
  const std::string token = kTokens[below(sizeof kTokens / sizeof *kTokens)];
  file.erase(file.begin() + static_cast<std::ptrdiff_t>(begin), file.begin() + static_cast<std::ptrdiff_t>(end));
  file.insert(file.begin() + static_cast<std::ptrdiff_t>(begin), token.begin(), token.end());
}

void alter_byte(Bytes& file, size_t begin, size_t end) {
  if (begin >= end) return;
  static const uint8_t kBytes[] = {0x00, 0x7f, 0x80, 0xff};
  uint8_t& byte = file[begin + static_cast<size_t>(below(static_cast<int64_t>(end - begin)))];
  byte = one_in(2) ? kBytes[below(4)] : static_cast<uint8_t>(byte ^ 1 << below(8));
}

void erase_part(Bytes& file, size_t begin, size_t end) {
  if (begin >= end) return;
  const auto from = static_cast<std::ptrdiff_t>(begin) + below(static_cast<int64_t>(end - begin));
  const auto count = std::min<std::ptrdiff_t>(1 + below(40), static_cast<std::ptrdiff_t>(end) - from);
  file.erase(file.begin() + from, file.begin() + from + count);
}

size_t header_end_of(const Bytes& file) {
  uint64_t length = 0;
  for (int i = 7; i >= 0; --i) length = length << 8 | file[static_cast<size_t>(i)];
  return 8 + static_cast<size_t>(length);
}

void set_header_end(Bytes& file, size_t end) {
  for (size_t i = 0; i < 8; ++i) file[i] = static_cast<uint8_t>((end - 8) >> 8 * i);
}

// Writes the right digest, if the file still has one, so that the checks behind it are reached.
void seal(Bytes& file) {
  try {
    const std::string digest = multifire_engine_impl::digest_of(
        multifire_engine_impl::parse_tensor_file(file.data(), file.size()));
    const std::string key = "\"digest\":\"";
    const auto at = std::search(file.begin(), file.end(), key.begin(), key.end());
    if (file.end() - at > static_cast<std::ptrdiff_t>(key.size() + digest.size()))
      std::copy(digest.begin(), digest.end(), at + static_cast<std::ptrdiff_t>(key.size()));
  } catch (const Failure&) {
  }
}

Bytes altered(Bytes file) {
  size_t header_end = header_end_of(file);
  for (int64_t i = below(4); i > 0; --i) {
    const size_t before = file.size();
    switch (below(5)) {
      case 0:
        replace_token(file, header_end);
        break;
      case 1:
        alter_byte(file, 8, header_end);
        break;
      case 2:
        alter_byte(file, header_end, file.size());
        break;
      case 3:
        erase_part(file, 8, header_end);
        break;
      default:
        for (int j = 0; j < 20; ++j) alter_byte(file, header_end, file.size());
    }
    header_end += file.size() - before;
    if (header_end > file.size()) return file;
  }
  if (!one_in(20)) set_header_end(file, header_end);
  if (one_in(20)) file.resize(static_cast<size_t>(below(static_cast<int64_t>(file.size()) + 40)));
  if (file.size() >= 8 && !one_in(5)) seal(file);
  return file;
}

float random_value() {
  static const float kOdd[] = {-1, 0.5f, 1e9f, 3e38f, 127, 128, 255, 70000};
  if (!one_in(200)) return static_cast<float>(below(4));
  return one_in(4) ? std::numeric_limits<float>::quiet_NaN() : kOdd[below(8)];
}

// An engine, and the buffers whose sizes the caller must get right.
struct Caller {
  multifire_engine* engine;
  multifire_info info;

  explicit Caller(multifire_engine* loaded) : engine(loaded) { refresh(); }
  void refresh() { check(multifire_engine_info(engine, &info) == MULTIFIRE_OK, "info"); }
  std::vector<float> frames(int64_t count) const {
    std::vector<float> values(
        static_cast<size_t>(std::max<int64_t>(1, count * info.in_channels * info.height * info.width)));
    if (!one_in(8))
      for (float& value : values) value = random_value();
    return values;
  }
  std::vector<float> logits(int64_t count) const {
    return std::vector<float>(static_cast<size_t>(std::max<int64_t>(1, count * info.classes)));
  }

  multifire_status prepare() {
    const int64_t height = one_in(20) ? below(2000) - 900 : 1 + below(9),
                  width = one_in(20) && height < 20 ? 1 + below(200) : 1 + below(9);
    const multifire_status status = multifire_engine_prepare(engine, height, width, one_in(20) ? below(70) : 1 + below(4));
    refresh();
    return status;
  }
  multifire_status step() {
    std::vector<float> out = logits(1);
    return multifire_engine_step(engine, one_in(50) ? nullptr : frames(1).data(), out.data());
  }
  multifire_status step_events() {
    std::vector<multifire_event> events(static_cast<size_t>(below(30)));
    for (multifire_event& e : events) {
      const auto coordinate = [](int64_t size) {
        return static_cast<int32_t>(one_in(100) ? random_bits() : static_cast<uint64_t>(below(size + 1)));
      };
      e = {coordinate(info_size(info.width)), coordinate(info_size(info.height)),
           static_cast<int32_t>(below(info.in_channels)),
           one_in(50) ? static_cast<int32_t>(random_bits()) : static_cast<int32_t>(below(5))};
    }
    std::vector<float> out = logits(1);
    return multifire_engine_step_events(engine, events.data(), events.size(), out.data());
  }
  static int64_t info_size(int64_t size) { return std::max<int64_t>(1, size - (one_in(10) ? 0 : 1)); }
  multifire_status run() {
    const int64_t timesteps = below(7), samples = below(3), frame = info.in_channels * info.height * info.width;
    const int64_t time_stride = one_in(3) ? 0 : samples * frame;
    const std::vector<float> values = frames(timesteps * samples);
    std::vector<float> out = logits(samples), each = logits(timesteps * samples);
    return multifire_engine_run(engine, values.data(), timesteps, samples, time_stride, frame, out.data(),
                                one_in(2) ? each.data() : nullptr);
  }
  multifire_status state() {
    const int64_t layer = below(info.layers + 2) - 1;
    multifire_layer_info found;
    multifire_status status = multifire_engine_layer(engine, layer, &found);
    if (status != MULTIFIRE_OK) return status;
    std::vector<float> values(static_cast<size_t>(found.membranes * found.channels * found.height * found.width));
    return multifire_engine_state(engine, layer, values.data());
  }
  multifire_status clone() {
    multifire_engine* copy = nullptr;
    const multifire_status status = multifire_engine_clone(engine, one_in(10) ? nullptr : &copy);
    if (status != MULTIFIRE_OK) return status;
    multifire_engine_free(engine);  // the clone must live on
    engine = copy;
    refresh();
    return status;
  }
  multifire_status call() {
    switch (below(10)) {
      case 0:
        return prepare();
      case 1:
        return multifire_engine_reset(one_in(10) ? nullptr : engine);
      case 2:
      case 3:
        return step_events();
      case 4:
      case 5:
        return run();
      case 6:
        return state();
      case 7:
        return clone();
      default:
        return step();
    }
  }
};

}  // namespace

int main(int argc, char** argv) {
  if (argc < 4) return 2;
  const int64_t inputs = std::atoll(argv[1]);
  random_bits.seed(static_cast<uint64_t>(std::atoll(argv[2])));
  std::vector<Bytes> files;
  for (int i = 3; i < argc; ++i) files.push_back(content_of(argv[i]));
  int64_t loaded = 0, calls = 0, refused = 0;
  for (int64_t i = 0; i < inputs; ++i) {
    const Bytes file = altered(files[static_cast<size_t>(below(static_cast<int64_t>(files.size())))]);
    multifire_engine* engine = nullptr;
    const multifire_status status = multifire_engine_load_memory(file.data(), file.size(), &engine);
    check((status == MULTIFIRE_OK) == (engine != nullptr), "a load without an engine, or an engine without a load");
    if (!engine) {
      check(status == MULTIFIRE_BAD_FILE && *multifire_engine_error(), "a file refused without a reason");
      continue;
    }
    ++loaded;
    Caller caller(engine);
    if (!one_in(4)) caller.prepare();
    for (int64_t left = below(6); left > 0; --left, ++calls) refused += caller.call() != MULTIFIRE_OK;
    multifire_engine_free(caller.engine);
  }
  std::printf("%lld files, of which %lld were loaded; %lld calls, of which %lld were refused\n",
              static_cast<long long>(inputs), static_cast<long long>(loaded), static_cast<long long>(calls),
              static_cast<long long>(refused));
  return 0;
}
