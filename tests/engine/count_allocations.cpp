// Counts the allocations of the engine's calls; prints those of loading and preparing, and those of all later calls.
//
// usage: count_allocations FILE

#include <cstddef>
#include <cstdio>
#include <vector>

#include "multifire_engine.h"

extern "C" void* __libc_malloc(size_t);
extern "C" void* __libc_calloc(size_t, size_t);

static long allocations = 0;

// These replace those of the C library, also in the engine; operator new calls malloc.
extern "C" void* malloc(size_t size) {
  ++allocations;
  return __libc_malloc(size);
}
extern "C" void* calloc(size_t count, size_t size) {
  ++allocations;
  return __libc_calloc(count, size);
}

int main(int, char** arguments) {
  multifire_engine* engine = nullptr;
  multifire_info info;
  if (multifire_engine_load_file(arguments[1], &engine) != MULTIFIRE_OK) return 1;
  if (multifire_engine_prepare(engine, 12, 10, 3) != MULTIFIRE_OK) return 1;
  if (multifire_engine_info(engine, &info) != MULTIFIRE_OK) return 1;
  std::vector<float> frames(static_cast<size_t>(5 * info.in_channels * 120), 1.0f), logits(static_cast<size_t>(info.classes));
  const std::vector<multifire_event> events(50, multifire_event{3, 4, 0, 1});
  const long before = allocations;
  int failed = 0;
  for (int i = 0; i < 3; ++i) {
    failed += multifire_engine_step(engine, frames.data(), logits.data()) != MULTIFIRE_OK;
    failed += multifire_engine_run(engine, frames.data(), 5, 1, info.in_channels * 120, 0, logits.data(), nullptr) != MULTIFIRE_OK;
    failed += multifire_engine_run(engine, frames.data(), 3, 1, 0, 0, logits.data(), nullptr) != MULTIFIRE_OK;
    failed += multifire_engine_reset(engine) != MULTIFIRE_OK;
    if (info.counts) failed += multifire_engine_step_events(engine, events.data(), events.size(), logits.data()) != MULTIFIRE_OK;
  }
  failed += multifire_engine_step(engine, nullptr, logits.data()) != MULTIFIRE_BAD_INPUT;
  const long after = allocations;
  multifire_engine_free(engine);
  std::printf("%ld %ld\n", before, after - before);
  return failed;
}
