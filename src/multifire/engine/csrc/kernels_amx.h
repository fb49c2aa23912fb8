// The dense sums for processors with AMX, whose tiles multiply 16 pixels of 64 bytes by 16 output channels. Everything
// else is as with AVX-512.
#ifndef MULTIFIRE_KERNELS_AMX_H
#define MULTIFIRE_KERNELS_AMX_H

#if defined(__x86_64__) && defined(__linux__)

#include <cpuid.h>
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "kernels.h"
#include "kernels_avx512.h"

namespace multifire_engine_impl {
namespace amx {

#define MULTIFIRE_AMX __attribute__((target("amx-tile,amx-int8,avx512f")))

constexpr int kRows = 16;                               // pixels of a tile
constexpr int kGroupsOfTile = 16;                       // 64 input channels
constexpr int kTileBytes = kGroupsOfTile * kItemBytes;  // the weights of a tile: one kilobyte, as they lie in memory

// Tiles 0 to 3 hold the sums of four runs of pixels, 4 and 5 pixels, 6 weights.
struct alignas(64) Shape {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {};
};

MULTIFIRE_AMX inline void configure(int even_rows, int odd_rows) {
  Shape shape;
  for (int i = 0; i < 6; ++i) shape.rows[i] = static_cast<uint8_t>(i % 2 ? odd_rows : even_rows);
  shape.rows[6] = kGroupsOfTile;
  _tile_loadconfig(&shape);
}

// A run of up to 16 neighbouring pixels, and where their sums go.
struct Run {
  const uint8_t* x;
  int32_t* sums;
};

// Four runs at once, so that a tile of weights is loaded once for four products.
MULTIFIRE_AMX inline void four_runs(const SumsArgs& a, const int8_t* weights, const Run (&runs)[4]) {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int item = 0; item < a.items; item += kGroupsOfTile, weights += kTileBytes) {
    const int64_t offset = a.offsets[item];
    _tile_loadd(6, weights, kItemBytes);
    _tile_loadd(4, runs[0].x + offset, a.pixel_stride);
    _tile_dpbusd(0, 4, 6);
    _tile_loadd(5, runs[1].x + offset, a.pixel_stride);
    _tile_dpbusd(1, 5, 6);
    _tile_loadd(4, runs[2].x + offset, a.pixel_stride);
    _tile_dpbusd(2, 4, 6);
    _tile_loadd(5, runs[3].x + offset, a.pixel_stride);
    _tile_dpbusd(3, 5, 6);
  }
  _tile_stored(0, runs[0].sums, kItemBytes);
  _tile_stored(1, runs[1].sums, kItemBytes);
  _tile_stored(2, runs[2].sums, kItemBytes);
  _tile_stored(3, runs[3].sums, kItemBytes);
}

MULTIFIRE_AMX inline void two_runs(const SumsArgs& a, const int8_t* weights, const Run (&runs)[4]) {
  _tile_zero(0);
  _tile_zero(1);
  for (int item = 0; item < a.items; item += kGroupsOfTile, weights += kTileBytes) {
    _tile_loadd(6, weights, kItemBytes);
    _tile_loadd(4, runs[0].x + a.offsets[item], a.pixel_stride);
    _tile_dpbusd(0, 4, 6);
    _tile_loadd(5, runs[1].x + a.offsets[item], a.pixel_stride);
    _tile_dpbusd(1, 5, 6);
  }
  _tile_stored(0, runs[0].sums, kItemBytes);
  _tile_stored(1, runs[1].sums, kItemBytes);
}

// Runs of a tile's first 16 pixels are even, those of its others odd; if it has no others, all are alike.
MULTIFIRE_AMX inline void dense_block(const SumsArgs& a, int block) {
  const bool is_wide = a.pixels > kRows;
  configure(is_wide ? kRows : a.pixels, is_wide ? a.pixels - kRows : a.pixels);
  const int8_t* weights = a.weights + block * a.block_stride;
  Run runs[4];
  int count = 0;
  for (int frame = 0; frame < a.frames; ++frame) {
    const uint8_t* x = a.x + frame * a.frame_stride;
    runs[count++] = {x, a.part(frame, block)};
    if (is_wide) runs[count++] = {x + kRows * a.pixel_stride, a.part(frame, block) + kRows * kBlock};
    const bool is_last = frame + 1 == a.frames;
    if (count == 1 && is_last) runs[count++] = runs[0];
    if (count == 4 || (count == 3 && is_last)) {
      if (count == 3) runs[3] = runs[2];
      four_runs(a, weights, runs);
      count = 0;
    } else if (count == 2 && is_last)
      two_runs(a, weights, runs);
  }
  _tile_release();
}

inline void dense_sums(const SumsArgs& a) {
  if (a.groups % kGroupsOfTile != 0) return avx512::dense_sums(a);
  for (int block = 0; block < a.blocks; ++block) dense_block(a, block);
}

// Asks the system for the use of tiles, which a process must do once.
inline bool runs_here() {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  const bool has_tiles = __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) && (edx >> 24 & 3) == 3;
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return has_tiles && avx512::runs_here() && syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

inline int blocks_at_once(int groups) { return groups % kGroupsOfTile == 0 ? 1 : 4; }

constexpr Kernels kKernels = {
    "amx", runs_here, kLargestActivation, dense_sums, avx512::sparse_sums, avx512::image_sums, avx512::fire, blocks_at_once,
    4,     0,         0};

}  // namespace amx
}  // namespace multifire_engine_impl

#endif
#endif
