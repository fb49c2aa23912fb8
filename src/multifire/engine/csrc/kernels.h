// The inner loops of the engine. Every instruction set has its own; all compute the same bits.
//
// Activations are bytes, channels last, in rows of pixels with a border of zeros. Output channels come in blocks of 16,
// input channels in groups of 4. An item is one group at one position of the kernel's window; the weights of a block
// are [items][16 output channels][4 input channels].
#ifndef MULTIFIRE_KERNELS_H
#define MULTIFIRE_KERNELS_H

#include <cstdint>

#include "network.h"

namespace multifire_engine_impl {

constexpr int kBlock = 16;
constexpr int kGroup = 4;
constexpr int kItemBytes = kBlock * kGroup;
constexpr int kParts = 4;  // blocks times frames in one call
constexpr int kTile = 32;  // largest number of output pixels in one call; they are neighbours in a row

struct SumsArgs {
  const uint8_t* x;        // the window's first input pixel, for the first output pixel
  int64_t pixel_stride;    // from the input of one output pixel to that of the next, in bytes
  const int32_t* offsets;  // of each item from x, in bytes
  int items, groups;
  const int32_t* ends;  // after these items, int16 sums must be widened; the last is `items`
  const int8_t* weights;
  int64_t block_stride;  // from the weights of one block to those of the next
  int pixels;
  int blocks;            // 1, 2 or 4
  int frames;            // blocks * frames is at most kParts
  int64_t frame_stride;  // from the input of one frame to that of the next
  int32_t* sums;         // [frames][blocks][kTile][kBlock]

  int32_t* part(int frame, int block) const { return sums + (frame * blocks + block) * kTile * kBlock; }
};

// One unit of an input pixel that is not zero: two or four neighbouring channels.
struct Entry {
  uint32_t bytes;   // the unit; two bytes are repeated
  int32_t weights;  // where its weights are, if the window began in the row's first column
};

// The sums over a list of the units that are not zero. The entries of a frame are sorted by row and column, so those of
// one row of a window are neighbours in the list.
struct SparseArgs {
  const Entry* entries;
  const int32_t* starts;  // the first entry of each pixel; here that of the window's first pixel, for the first output pixel
  int64_t row_starts;     // from one row of starts to the next
  int column;             // of the window, for the first output pixel
  int stride, kernel;
  const int8_t* weights;
  int64_t block_stride;  // see SumsArgs; not for units of two channels
  int64_t column_size;   // bytes of weights of one position of the window
  int span;              // positions of a row of the window whose int16 sums fit: `kernel` or 1
  const bool* widens;    // after which positions int16 sums must be widened
  int pixels;
  int blocks;     // 2 or 4
  int32_t* sums;  // [blocks][kTile][kBlock]
};

// The first layer of networks for images. Products of float32 are exact in float64, so the order of their sums hardly
// matters: they are rounded to float32 once.
struct ImageArgs {
  const double* x;  // the window's first pixel, for the first output pixel; channels last
  int64_t row_stride;
  int channels;
  const double* weights;   // [3][3][channels][...]
  int64_t weights_stride;  // from one input channel to the next
  int pixels;
  float* sums;  // [pixels][kBlock]
};

struct FireArgs {
  const void* sums;  // [pixels][kBlock], int32, or float if has_floats
  bool has_floats;
  const float *scale, *bias;  // [kBlock]
  float* membranes;           // [pixels][levels or 1][kBlock], what they keep after the reset
  int pixels;
  const Neuron* neuron;
  bool adds;  // add the spikes to `out`, which holds the shortcut
  uint8_t* out;
  int64_t out_stride;  // from pixel to pixel
};

struct Kernels {
  const char* name;
  bool (*runs_here)();
  int largest_input;  // the largest activation for which the sums are right
  void (*dense_sums)(const SumsArgs&);
  void (*sparse_sums)(const SparseArgs&);  // of one frame
  void (*image_sums)(const ImageArgs&);
  void (*fire)(const FireArgs&);
  int (*blocks_at_once)(int groups);  // 1, 2 or 4: the fastest for layers of so many groups of input channels
  int sparse_unit;                    // channels of an entry: 2 or 4
  // A list of two or of four blocks is faster if at most this fraction of the units is not zero; 0: there is none.
  float two_below, four_below;
};

#if defined(__GNUC__)
#define MULTIFIRE_INLINE __attribute__((always_inline)) inline
#else
#define MULTIFIRE_INLINE inline
#endif

// A product that is rounded before it is added: compilers may fuse the two unless they are told otherwise.
inline float rounded(float product) {
#if defined(__aarch64__)
  __asm__("" : "+w"(product));
#elif defined(__FP_FAST_FMAF) && !defined(__x86_64__)
  volatile float stored = product;
  product = stored;
#endif
  return product;
}

}  // namespace multifire_engine_impl

#endif
