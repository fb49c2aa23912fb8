/* Reads frames or events from standard input, and prints a prediction after each frame.
 *
 *   program < frames.bin      frames [C, H, W] of 32-bit floats, one after the other; an image is one frame
 *   program --events          lines "x y p" or "x y p count"; an empty line ends a frame (for networks of events)
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "multifire_engine.h"
#include "network.h"

#define FRAME_SIZE (NETWORK_CHANNELS * NETWORK_HEIGHT * NETWORK_WIDTH)
#define MAX_EVENTS (1 << 20)

static const char* const names[NETWORK_CLASSES] = {@names@};

static int failed(const char* what) {
  fprintf(stderr, "error: %s\n", what);
  return 1;
}

static void print_prediction(int sample, int frame, const float* logits) {
  int best = 0;
  for (int k = 1; k < NETWORK_CLASSES; ++k)
    if (logits[k] > logits[best]) best = k;
  printf("sample %d, frame %d/%d: class %d, %s; logits", sample, frame, NETWORK_TIMESTEPS, best, names[best]);
  for (int k = 0; k < NETWORK_CLASSES; ++k) printf(" %.9g", (double)logits[k]);
  printf("\n");
  fflush(stdout);
}

/* Reads the events of a frame; returns their number, -1 at the end of the input, -2 for a line that is no event, -3 for
   too many events. */
static long read_events(multifire_event* events) {
  char line[128];
  long count = 0;
  while (fgets(line, sizeof line, stdin)) {
    if (line[0] == '\n' || line[0] == '\r') return count;
    if (count == MAX_EVENTS) return -3;
    multifire_event* event = &events[count];
    event->count = 1;
    if (sscanf(line, "%d %d %d %d", &event->x, &event->y, &event->p, &event->count) < 3) return -2;
    ++count;
  }
  return count ? count : -1;
}

/* Computes the next frame of the input; returns 1, 0 at the end of the input, or -1 after an error. */
static int next_frame(multifire_engine* engine, int as_events, float* frame, multifire_event* events, float* logits) {
  if (as_events) {
    const long count = read_events(events);
    if (count == -1) return 0;
    if (count == -3) return -failed("a frame has more than 1048576 events; end each frame with an empty line");
    if (count < 0) return -failed("expected lines \"x y p\" or \"x y p count\"");
    if (multifire_engine_step_events(engine, events, (size_t)count, logits)) return -failed(multifire_engine_error());
    return 1;
  }
  const size_t read = fread(frame, sizeof *frame, FRAME_SIZE, stdin);
  if (read == 0) return 0;
  if (read < FRAME_SIZE) return -failed("the last frame is incomplete");
  for (int shown = 0; shown < (NETWORK_COUNTS ? 1 : NETWORK_TIMESTEPS); ++shown)
    if (multifire_engine_step(engine, frame, logits)) return -failed(multifire_engine_error());
  return 1;
}

int main(int argc, char** argv) {
  const int as_events = argc == 2 && strcmp(argv[1], "--events") == 0;
  if (argc > 1 && !as_events) return failed("usage: program [--events] < input");
  if (as_events && !NETWORK_COUNTS) return failed("this network takes images, not events");
  multifire_engine* engine = NULL;
  float* frame = malloc(FRAME_SIZE * sizeof *frame);
  multifire_event* events = malloc(MAX_EVENTS * sizeof *events);
  float logits[NETWORK_CLASSES];
  if (!frame || !events) return failed("out of memory");
  if (multifire_engine_load_memory(network, network_size, &engine) ||
      multifire_engine_prepare(engine, NETWORK_HEIGHT, NETWORK_WIDTH, 1))
    return failed(multifire_engine_error());
  const int frames_of_a_sample = NETWORK_COUNTS ? NETWORK_TIMESTEPS : 1;
  int sample = 1, frames = 0, status;
  while ((status = next_frame(engine, as_events, frame, events, logits)) > 0) {
    ++frames;
    print_prediction(sample, NETWORK_COUNTS ? frames : NETWORK_TIMESTEPS, logits);
    if (frames == frames_of_a_sample) {
      multifire_engine_reset(engine);
      ++sample;
      frames = 0;
    }
  }
  multifire_engine_free(engine);
  free(events);
  free(frame);
  return status < 0;
}
