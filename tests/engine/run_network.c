/* Runs a network on samples [T, N, C, H, W] of floats from standard input, as a batch and as streams. Writes as floats
 * the logits of the batch, of each step and their means, then for each stream the logits after each frame and the
 * membranes after the last one. To standard error it writes the instruction set, and how many frames of all layers were
 * computed from lists.
 *
 * usage: run_network FILE T N H W
 */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

#include "multifire_engine.h"

static void check(multifire_status status) {
  if (status == MULTIFIRE_OK) return;
  fprintf(stderr, "%s\n", multifire_engine_error());
  exit(1);
}

static float* floats(int64_t count) {
  float* values = calloc((size_t)count, sizeof *values);
  if (!values) exit(2);
  return values;
}

static void put(const float* values, int64_t count) { fwrite(values, sizeof *values, (size_t)count, stdout); }

static void put_states(const multifire_engine* engine, int64_t layers) {
  for (int64_t i = 0; i < layers; ++i) {
    multifire_layer_info layer;
    check(multifire_engine_layer(engine, i, &layer));
    const int64_t size = layer.membranes * layer.channels * layer.height * layer.width;
    float* state = floats(size);
    check(multifire_engine_state(engine, i, state));
    put(state, size);
    free(state);
  }
}

static int64_t sparse_frames(const multifire_engine* engine, int64_t layers) {
  int64_t frames = 0;
  for (int64_t i = 0; i < layers; ++i) {
    multifire_layer_info layer;
    check(multifire_engine_layer(engine, i, &layer));
    frames += layer.sparse_frames;
  }
  return frames;
}

static void run_batch(multifire_engine* engine, const float* frames, int64_t steps, int64_t samples, int64_t frame_size,
                      int64_t classes) {
  float *means = floats(samples * classes), *logits = floats(steps * samples * classes);
  check(multifire_engine_run(engine, frames, steps, samples, samples * frame_size, frame_size, means, logits));
  put(logits, steps * samples * classes);
  put(means, samples * classes);
  free(logits);
  free(means);
}

int main(int argc, char** argv) {
  multifire_engine* engine = NULL;
  multifire_info info;
  if (argc != 6) return 2;
  const int64_t steps = atoi(argv[2]), samples = atoi(argv[3]), height = atoi(argv[4]), width = atoi(argv[5]);
  check(multifire_engine_load_file(argv[1], &engine));
  check(multifire_engine_prepare(engine, height, width, steps));
  check(multifire_engine_info(engine, &info));
  const int64_t frame_size = info.in_channels * height * width, count = steps * samples * frame_size;
  float *frames = floats(count), *logits = floats(info.classes);
  if (fread(frames, sizeof *frames, (size_t)count, stdin) != (size_t)count) return 2;
  run_batch(engine, frames, steps, samples, frame_size, info.classes);
  for (int64_t n = 0; n < samples; ++n) {
    check(multifire_engine_reset(engine));
    for (int64_t t = 0; t < steps; ++t) {
      check(multifire_engine_step(engine, frames + (t * samples + n) * frame_size, logits));
      put(logits, info.classes);
    }
    put_states(engine, info.layers);
  }
  fprintf(stderr, "%s %ld\n", info.isa, (long)sparse_frames(engine, info.layers));
  multifire_engine_free(engine);
  free(logits);
  free(frames);
  return 0;
}
