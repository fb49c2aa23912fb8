/* Runs an int8 network that `multifire export --to int8` wrote: one call for each frame, without Python.
 *
 * Every function that can fail returns MULTIFIRE_OK or another status; multifire_engine_error() then tells the reason in a
 * sentence. Engines are independent of each other: different threads may use different engines at the same time.
 */
#ifndef MULTIFIRE_ENGINE_H
#define MULTIFIRE_ENGINE_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#if defined(__GNUC__)
#define MULTIFIRE_API __attribute__((visibility("default")))
#else
#define MULTIFIRE_API
#endif

typedef struct multifire_engine multifire_engine;

typedef enum multifire_status {
  MULTIFIRE_OK = 0,
  MULTIFIRE_NO_FILE = 1,   /* the file cannot be read */
  MULTIFIRE_BAD_FILE = 2,  /* the file is damaged, or of a kind that the engine does not run */
  MULTIFIRE_BAD_INPUT = 3, /* an argument, a frame or an event is not as expected */
  MULTIFIRE_NO_MEMORY = 4, /* memory cannot be allocated */
  MULTIFIRE_BUSY = 5       /* another thread is using this engine */
} multifire_status;

/* Events of one pixel and polarity in one frame; events of the same cell add up. */
typedef struct multifire_event {
  int32_t x;     /* column */
  int32_t y;     /* row */
  int32_t p;     /* polarity: the channel */
  int32_t count; /* number of events, at least 0 */
} multifire_event;

typedef struct multifire_info {
  int64_t in_channels;
  int64_t classes;
  int64_t levels;
  int64_t layers; /* layers of neurons */
  int64_t counts; /* 1 if frames are event counts, 0 if they are images */
  int64_t height; /* of the frames that the engine is prepared for; 0 before */
  int64_t width;
  int64_t bytes;   /* memory that the engine holds: weights, membranes and activations */
  const char* isa; /* instruction set in use */
} multifire_info;

typedef struct multifire_layer_info {
  const char* name; /* as in the file, such as "stages.0.1.fire2"; valid until the engine and its clones are freed */
  int64_t membranes, channels, height, width; /* shape of the layer's state */
  int64_t frames;                             /* frames since the engine was prepared */
  int64_t sparse_frames;                      /* those that were computed from the list of non-zero inputs */
  double density; /* fraction of the pairs or fours of input channels that were not zero; -1 if not counted */
} multifire_layer_info;

/* Reads a network; the engine must then be prepared. The file is checked like that of a stranger. */
MULTIFIRE_API multifire_status multifire_engine_load_file(const char* path, multifire_engine** engine);
MULTIFIRE_API multifire_status multifire_engine_load_memory(const void* bytes, size_t size, multifire_engine** engine);

/* Makes another engine, not yet prepared, that shares the weights: one engine for each thread of a batch. */
MULTIFIRE_API multifire_status multifire_engine_clone(const multifire_engine* engine, multifire_engine** clone);

MULTIFIRE_API void multifire_engine_free(multifire_engine* engine);

/* Allocates everything for frames of this size, and resets. No later call allocates memory. `steps` is the number of
 * frames that multifire_engine_run computes at once: 1 for a stream, the T of a sample for speed. */
MULTIFIRE_API multifire_status multifire_engine_prepare(multifire_engine* engine, int64_t height, int64_t width,
                                                        int64_t steps);

/* Sets all membranes to zero: the next frame begins a new sample. */
MULTIFIRE_API multifire_status multifire_engine_reset(multifire_engine* engine);

/* Computes one frame [C, H, W] of a stream; writes the mean logits [classes] of the frames since the reset. After an
 * error the stream is as before the call. */
MULTIFIRE_API multifire_status multifire_engine_step(multifire_engine* engine, const float* frame, float* logits);

/* The same for a frame given as events, for networks of event counts. */
MULTIFIRE_API multifire_status multifire_engine_step_events(multifire_engine* engine, const multifire_event* events,
                                                            size_t count, float* logits);

/* Computes N samples of T frames, each frame contiguous [C, H, W]; frame t of sample n begins at
 * frames + t * time_stride + n * sample_stride. A time_stride of 0 is a still image. Writes the mean logits [N, classes]
 * and, unless NULL, those of each step [T, N, classes]. Resets before each sample and at the end. */
MULTIFIRE_API multifire_status multifire_engine_run(multifire_engine* engine, const float* frames, int64_t timesteps,
                                                    int64_t samples, int64_t time_stride, int64_t sample_stride,
                                                    float* logits, float* logits_per_step);

MULTIFIRE_API multifire_status multifire_engine_info(const multifire_engine* engine, multifire_info* info);
MULTIFIRE_API multifire_status multifire_engine_layer(const multifire_engine* engine, int64_t layer,
                                                      multifire_layer_info* info);

/* Copies a layer's membranes after the last step, [membranes, channels, height, width]; see multifire_engine_layer. */
MULTIFIRE_API multifire_status multifire_engine_state(const multifire_engine* engine, int64_t layer, float* state);

/* The reason of this thread's last error. */
MULTIFIRE_API const char* multifire_engine_error(void);

#ifdef __cplusplus
}
#endif

#endif
