// The C functions: they check arguments, and turn every failure into a status and a sentence.

#include <atomic>
#include <cstdio>
#include <exception>
#include <memory>
#include <new>
#include <vector>

#include "failure.h"
#include "machine.h"
#include "multifire_engine.h"
#include "network.h"
#include "tensor_file.h"
#include "workspace.h"

using multifire_engine_impl::Failure;
using multifire_engine_impl::Kernels;
using multifire_engine_impl::Weights;
using multifire_engine_impl::Workspace;

struct multifire_engine {
  std::shared_ptr<const Weights> weights;
  const Kernels* kernels;
  std::unique_ptr<Workspace> workspace;  // after multifire_engine_prepare
  mutable std::atomic_flag busy = ATOMIC_FLAG_INIT;
};

namespace {

thread_local char last_error[512] = "";

multifire_status failed(multifire_status status, const char* text) {
  std::snprintf(last_error, sizeof last_error, "%s", text);
  return status;
}

multifire_status bad_input(const char* text) { return failed(MULTIFIRE_BAD_INPUT, text); }

// Calls f; no exception leaves it.
template <class F>
multifire_status guarded(F f) {
  try {
    return f();
  } catch (const Failure& failure) {
    return failed(failure.status, failure.text.c_str());
  } catch (const std::bad_alloc&) {
    return failed(MULTIFIRE_NO_MEMORY, "not enough memory");
  } catch (const std::exception& error) {
    return failed(MULTIFIRE_BAD_FILE, error.what());
  }
}

// Calls f while no other thread can use the engine.
template <class F>
multifire_status exclusively(const multifire_engine* engine, F f) {
  if (!engine) return bad_input("the engine is NULL");
  if (engine->busy.test_and_set(std::memory_order_acquire))
    return failed(MULTIFIRE_BUSY, "another thread is using this engine; take a clone for each thread");
  const multifire_status status = guarded(f);
  engine->busy.clear(std::memory_order_release);
  return status;
}

// The same for an engine that is prepared.
template <class F>
multifire_status prepared(const multifire_engine* engine, F f) {
  return exclusively(engine, [&] {
    if (!engine->workspace) return bad_input("the engine is not prepared; call multifire_engine_prepare first");
    return f(*engine->workspace);
  });
}

std::vector<uint8_t> content_of(const char* path) {
  const std::unique_ptr<std::FILE, int (*)(std::FILE*)> file(std::fopen(path, "rb"), std::fclose);
  std::vector<uint8_t> bytes;
  uint8_t part[1 << 12];
  for (size_t count = 1; file && count > 0; bytes.insert(bytes.end(), part, part + count))
    count = std::fread(part, 1, sizeof part, file.get());
  if (!file || std::ferror(file.get())) throw Failure{MULTIFIRE_NO_FILE, std::string(path) + " cannot be read"};
  return bytes;
}

std::unique_ptr<multifire_engine> loaded(const uint8_t* bytes, size_t size) {
  std::unique_ptr<multifire_engine> engine(new multifire_engine);
  const multifire_engine_impl::TensorFile file = multifire_engine_impl::read_tensor_file(bytes, size);
  const multifire_engine_impl::Network network(file);
  engine->kernels = &multifire_engine_impl::chosen_kernels(network.model.largest_activation());
  engine->weights = std::make_shared<const Weights>(network, *engine->kernels);
  return engine;
}

}  // namespace

extern "C" {

const char* multifire_engine_error(void) { return last_error; }

multifire_status multifire_engine_load_file(const char* path, multifire_engine** engine) {
  if (!path || !engine) return bad_input("path or engine is NULL");
  *engine = nullptr;
  return guarded([&] {
    multifire_engine_impl::chosen_kernels(0);  // an impossible choice is reported first
    const std::vector<uint8_t> bytes = content_of(path);
    *engine = loaded(bytes.data(), bytes.size()).release();
    return MULTIFIRE_OK;
  });
}

multifire_status multifire_engine_load_memory(const void* bytes, size_t size, multifire_engine** engine) {
  if (!bytes || !engine) return bad_input("bytes or engine is NULL");
  *engine = nullptr;
  return guarded([&] {
    *engine = loaded(static_cast<const uint8_t*>(bytes), size).release();
    return MULTIFIRE_OK;
  });
}

multifire_status multifire_engine_clone(const multifire_engine* engine, multifire_engine** clone) {
  if (!engine || !clone) return bad_input("engine or clone is NULL");
  *clone = nullptr;
  return guarded([&] {
    std::unique_ptr<multifire_engine> copy(new multifire_engine);
    copy->weights = engine->weights;
    copy->kernels = engine->kernels;
    *clone = copy.release();
    return MULTIFIRE_OK;
  });
}

void multifire_engine_free(multifire_engine* engine) { delete engine; }

multifire_status multifire_engine_prepare(multifire_engine* engine, int64_t height, int64_t width, int64_t steps) {
  using multifire_engine_impl::kMaxSize;
  if (height < 1 || height > kMaxSize || width < 1 || width > kMaxSize)
    return bad_input("height and width must be 1 to 1024");
  if (steps < 1 || steps > 64) return bad_input("steps must be 1 to 64");
  return exclusively(engine, [&] {
    engine->workspace.reset();  // first, so that both are never in memory
    engine->workspace.reset(new Workspace(*engine->weights, *engine->kernels, static_cast<int>(height),
                                          static_cast<int>(width), static_cast<int>(steps)));
    return MULTIFIRE_OK;
  });
}

multifire_status multifire_engine_reset(multifire_engine* engine) {
  return prepared(engine, [&](Workspace& workspace) {
    workspace.reset();
    return MULTIFIRE_OK;
  });
}

multifire_status multifire_engine_step(multifire_engine* engine, const float* frame, float* logits) {
  if (!frame || !logits) return bad_input("frame or logits is NULL");
  return prepared(engine, [&](Workspace& workspace) {
    if (const char* fault = workspace.fault(frame)) return bad_input(fault);
    workspace.step(frame, logits);
    return MULTIFIRE_OK;
  });
}

multifire_status multifire_engine_step_events(multifire_engine* engine, const multifire_event* events, size_t count,
                                              float* logits) {
  if ((!events && count > 0) || !logits) return bad_input("events or logits is NULL");
  return prepared(engine, [&](Workspace& workspace) {
    if (!engine->weights->model.counts) return bad_input("the network is for images, expected a frame");
    if (const char* fault = workspace.collect(events, count)) return bad_input(fault);
    workspace.step_events(events, count, logits);
    return MULTIFIRE_OK;
  });
}

multifire_status multifire_engine_run(multifire_engine* engine, const float* frames, int64_t timesteps, int64_t samples,
                                      int64_t time_stride, int64_t sample_stride, float* logits, float* logits_per_step) {
  if (timesteps < 1 || samples < 0) return bad_input("timesteps must be at least 1, and samples at least 0");
  if (samples > 0 && (!frames || !logits)) return bad_input("frames or logits is NULL");
  return prepared(engine, [&](Workspace& workspace) {
    const int64_t classes = engine->weights->model.classes;
    for (int64_t n = 0; n < samples; ++n)
      for (int64_t t = 0; t < (time_stride == 0 ? 1 : timesteps); ++t)
        if (const char* fault = workspace.fault(frames + t * time_stride + n * sample_stride)) return bad_input(fault);
    for (int64_t n = 0; n < samples; ++n)
      workspace.run(frames + n * sample_stride, timesteps, time_stride, logits + n * classes,
                    logits_per_step ? logits_per_step + n * classes : nullptr, samples * classes);
    workspace.reset();
    return MULTIFIRE_OK;
  });
}

multifire_status multifire_engine_info(const multifire_engine* engine, multifire_info* info) {
  if (!info) return bad_input("info is NULL");
  return exclusively(engine, [&] {
    const multifire_engine_impl::Model& model = engine->weights->model;
    const Workspace* workspace = engine->workspace.get();
    const int64_t bytes = engine->weights->bytes() + (workspace ? workspace->bytes() : 0);
    *info = {model.in_channels,
             model.classes,
             model.neuron.levels,
             static_cast<int64_t>(engine->weights->layers.size()) + 1,
             model.counts,
             workspace ? workspace->height() : 0,
             workspace ? workspace->width() : 0,
             bytes,
             engine->kernels->name};
    return MULTIFIRE_OK;
  });
}

multifire_status multifire_engine_layer(const multifire_engine* engine, int64_t layer, multifire_layer_info* info) {
  if (!info) return bad_input("info is NULL");
  return prepared(engine, [&](Workspace& workspace) {
    if (layer < 0 || layer >= static_cast<int64_t>(workspace.stages().size())) return bad_input("there is no such layer");
    const Weights& weights = *engine->weights;
    const auto& stage = workspace.stages()[static_cast<size_t>(layer)];
    const double seen = static_cast<double>(stage.units_seen), active = static_cast<double>(stage.units_active);
    *info = {stage.layer ? stage.layer->name.c_str() : "stem",
             weights.model.neuron.membranes(),
             stage.layer ? stage.layer->out_channels : weights.stem.out_channels,
             stage.out->height,
             stage.out->width,
             stage.frames,
             stage.sparse_frames,
             seen > 0 ? active / seen : -1};
    return MULTIFIRE_OK;
  });
}

multifire_status multifire_engine_state(const multifire_engine* engine, int64_t layer, float* state) {
  if (!state) return bad_input("state is NULL");
  return prepared(engine, [&](Workspace& workspace) {
    if (layer < 0 || layer >= static_cast<int64_t>(workspace.stages().size())) return bad_input("there is no such layer");
    const auto& stage = workspace.stages()[static_cast<size_t>(layer)];
    workspace.copy_state(layer, stage.layer ? stage.layer->out_channels : engine->weights->stem.out_channels, state);
    return MULTIFIRE_OK;
  });
}

}  // extern "C"
