// Reads the safetensors files of multifire: a header of texts, tensors, and a digest of both.
#ifndef MULTIFIRE_TENSOR_FILE_H
#define MULTIFIRE_TENSOR_FILE_H

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <string>
#include <utility>
#include <vector>

#include "failure.h"
#include "json.h"
#include "sha256.h"

namespace multifire_engine_impl {

// A tensor in the file's memory, which must outlive it.
struct Tensor {
  std::string name;
  bool is_int8;  // else float32
  std::vector<int64_t> shape;
  const uint8_t* bytes;
  size_t begin, size;  // in bytes

  int64_t values() const { return static_cast<int64_t>(size) / (is_int8 ? 1 : 4); }
  int8_t int8_at(int64_t i) const { return static_cast<int8_t>(bytes[i]); }
  float float_at(int64_t i) const {
    const uint8_t* b = bytes + 4 * i;
    const uint32_t bits = uint32_t{b[0]} | uint32_t{b[1]} << 8 | uint32_t{b[2]} << 16 | uint32_t{b[3]} << 24;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
  }
};

struct TensorFile {
  std::vector<std::pair<std::string, std::string>> header;  // sorted by name
  std::vector<Tensor> tensors;                              // sorted by name

  const std::string* text(const std::string& name) const {
    for (const auto& entry : header)
      if (entry.first == name) return &entry.second;
    return nullptr;
  }
};

constexpr size_t kMaxTensors = 8192;

inline Tensor tensor_of(const std::string& name, const Json& json, const uint8_t* data, size_t size) {
  const Json *type = json.find("dtype"), *shape = json.find("shape"), *offsets = json.find("data_offsets");
  require(type && shape && offsets && json.items.size() == 3, "its header does not describe its tensors");
  require(type->kind == Json::kString && (type->text == "I8" || type->text == "F32"),
          "it has tensors of other types than int8 and float32");
  require(shape->kind == Json::kArray && shape->items.size() <= 4, "it has tensors of more than four dimensions");
  require(offsets->kind == Json::kArray && offsets->items.size() == 2, "its header does not describe its tensors");
  Tensor tensor{name, type->text == "I8", {}, nullptr, 0, 0};
  const auto limit = static_cast<int64_t>(size);
  int64_t bytes = tensor.is_int8 ? 1 : 4;
  for (const Json& item : shape->items) {
    const int64_t length = integer_of(item, limit);
    tensor.shape.push_back(length);
    require(length == 0 || bytes <= limit / length, "it has a tensor that is larger than the file");
    bytes *= length;
  }
  const int64_t begin = integer_of(offsets->items[0], limit), end = integer_of(offsets->items[1], limit);
  require(begin <= end && end - begin == bytes, "the size of a tensor does not fit its shape");
  tensor.begin = static_cast<size_t>(begin);
  tensor.size = static_cast<size_t>(bytes);
  tensor.bytes = data + begin;
  return tensor;
}

// The tensors must cover the data without gaps and overlaps.
inline void check_coverage(const std::vector<Tensor>& tensors, size_t size) {
  std::vector<std::pair<size_t, size_t>> parts;
  for (const Tensor& tensor : tensors) parts.emplace_back(tensor.begin, tensor.size);
  std::sort(parts.begin(), parts.end());
  size_t at = 0;
  for (const auto& part : parts) {
    require(part.first == at, "its tensors overlap or leave gaps");
    at += part.second;
  }
  require(at == size, "its tensors do not fill it; it may be cut");
}

// A text as json.dumps of Python writes it: ASCII, everything else as \uXXXX.
inline std::string dumped(const std::string& text) {
  static const char* kHex = "0123456789abcdef";
  std::string out = "\"";
  const auto unit = [&](uint32_t code) {
    out += "\\u";
    for (int shift = 12; shift >= 0; shift -= 4) out += kHex[(code >> shift) & 15];
  };
  for (size_t i = 0; i < text.size(); ++i) {
    const auto c = static_cast<unsigned char>(text[i]);
    const char* escaped = c == '"'    ? "\\\""
                          : c == '\\' ? "\\\\"
                          : c == '\n' ? "\\n"
                          : c == '\r' ? "\\r"
                          : c == '\t' ? "\\t"
                          : c == '\f' ? "\\f"
                          : c == '\b' ? "\\b"
                                      : nullptr;
    if (escaped) {
      out += escaped;
      continue;
    }
    if (c < 0x80) {
      if (c >= 0x20 && c < 0x7f)
        out += static_cast<char>(c);
      else
        unit(c);
      continue;
    }
    const int more = c >= 0xf0 ? 3 : c >= 0xe0 ? 2 : 1;  // the reader has checked that it is UTF-8
    uint32_t point = c & (0x3fu >> more);
    for (int j = 0; j < more; ++j) point = point << 6 | (static_cast<unsigned char>(text[++i]) & 0x3f);
    if (point < 0x10000) {
      unit(point);
      continue;
    }
    unit(0xd800 + ((point - 0x10000) >> 10));
    unit(0xdc00 + ((point - 0x10000) & 0x3ff));
  }
  return out + "\"";
}

// As multifire.utils.tensor_files computes it.
inline std::string digest_of(const TensorFile& file) {
  Sha256 sha;
  std::string header;
  for (const auto& entry : file.header)
    if (entry.first != "digest") header += (header.empty() ? "" : ", ") + dumped(entry.first) + ": " + dumped(entry.second);
  sha.update("{" + header + "}");
  for (const Tensor& tensor : file.tensors) {
    std::string shape;
    for (int64_t length : tensor.shape) shape += (shape.empty() ? "" : ", ") + std::to_string(length);
    if (tensor.shape.size() == 1) shape += ",";
    sha.update(tensor.name + " torch." + (tensor.is_int8 ? "int8" : "float32") + " (" + shape + ")");
    sha.update(tensor.bytes, tensor.size);
  }
  return sha.digest();
}

// Reads a file without its digest.
inline TensorFile parse_tensor_file(const uint8_t* bytes, size_t size) {
  require(size >= 8, "it is too short for a safetensors file");
  uint64_t length = 0;
  for (int i = 7; i >= 0; --i) length = length << 8 | bytes[i];
  require(length <= size - 8, "its header is longer than the file");
  const auto* text = reinterpret_cast<const char*>(bytes) + 8;
  const Json json = JsonReader(text, text + length).read();
  require(json.kind == Json::kObject && json.items.size() <= kMaxTensors, "its header does not describe its tensors");
  const uint8_t* data = bytes + 8 + length;
  const size_t data_size = size - 8 - static_cast<size_t>(length);
  TensorFile file;
  for (size_t i = 0; i < json.items.size(); ++i) {
    const Json& item = json.items[i];
    require(item.kind == Json::kObject, "its header does not describe its tensors");
    if (json.names[i] != "__metadata__") {
      file.tensors.push_back(tensor_of(json.names[i], item, data, data_size));
      continue;
    }
    for (size_t j = 0; j < item.items.size(); ++j) {
      require(item.items[j].kind == Json::kString, "its header has values that are not texts");
      file.header.emplace_back(item.names[j], item.items[j].text);
    }
  }
  check_coverage(file.tensors, data_size);
  std::sort(file.header.begin(), file.header.end());
  std::sort(file.tensors.begin(), file.tensors.end(), [](const Tensor& a, const Tensor& b) { return a.name < b.name; });
  return file;
}

inline TensorFile read_tensor_file(const uint8_t* bytes, size_t size) {
  TensorFile file = parse_tensor_file(bytes, size);
  const std::string* digest = file.text("digest");
  require(digest != nullptr, "it is not a file that multifire wrote");
  require(*digest == digest_of(file), "it is damaged: its content does not match its digest");
  return file;
}

}  // namespace multifire_engine_impl

#endif
