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

constexpr int kRows = 16;                       // pixels of a tile
constexpr int kGroupsOfTile = 16;               // 64 input channels
constexpr int kTileBytes = kGroupsOfTile * kItemBytes;  // the weights of a tile: one kilobyte, as they lie in memory

// Tiles 0 to 3 hold sums, 4 and 5 pixels, 6 and 7 weights; the second of a pair of pixel tiles may have fewer rows.
struct alignas(64) Shape {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {};
};

MULTIFIRE_AMX inline void configure(int first_rows, int second_rows) {
  Shape shape;
  const int rows[8] = {first_rows, first_rows, second_rows, second_rows, first_rows, second_rows, kRows, kRows};
  for (int i = 0; i < 8; ++i) shape.rows[i] = static_cast<uint8_t>(rows[i]);
  _tile_loadconfig(&shape);
}

inline int tiles_of(const SumsArgs& a) { return a.items / kGroupsOfTile; }
inline const uint8_t* pixels_of(const SumsArgs& a, int tile) { return a.x + a.offsets[tile * kGroupsOfTile]; }

// 17 to 32 pixels, two blocks.
MULTIFIRE_AMX inline void two_by_two(const SumsArgs& a, const int8_t* weights, int32_t* sums) {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int tile = 0; tile < tiles_of(a); ++tile, weights += kTileBytes) {
    const uint8_t* x = pixels_of(a, tile);
    _tile_loadd(4, x, a.pixel_stride);
    _tile_loadd(6, weights, kItemBytes);
    _tile_dpbusd(0, 4, 6);
    _tile_loadd(7, weights + a.block_stride, kItemBytes);
    _tile_dpbusd(1, 4, 7);
    _tile_loadd(5, x + kRows * a.pixel_stride, a.pixel_stride);
    _tile_dpbusd(2, 5, 6);
    _tile_dpbusd(3, 5, 7);
  }
  _tile_stored(0, sums, kItemBytes);
  _tile_stored(1, sums + kTile * kBlock, kItemBytes);
  _tile_stored(2, sums + kRows * kBlock, kItemBytes);
  _tile_stored(3, sums + (kTile + kRows) * kBlock, kItemBytes);
}

// Up to 16 pixels, four blocks.
MULTIFIRE_AMX inline void one_by_four(const SumsArgs& a) {
  const int8_t* weights = a.weights;
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int tile = 0; tile < tiles_of(a); ++tile, weights += kTileBytes) {
    _tile_loadd(4, pixels_of(a, tile), a.pixel_stride);
    _tile_loadd(6, weights, kItemBytes);
    _tile_dpbusd(0, 4, 6);
    _tile_loadd(7, weights + a.block_stride, kItemBytes);
    _tile_dpbusd(1, 4, 7);
    _tile_loadd(6, weights + 2 * a.block_stride, kItemBytes);
    _tile_dpbusd(2, 4, 6);
    _tile_loadd(7, weights + 3 * a.block_stride, kItemBytes);
    _tile_dpbusd(3, 4, 7);
  }
  _tile_stored(0, a.sums, kItemBytes);
  _tile_stored(1, a.sums + kTile * kBlock, kItemBytes);
  _tile_stored(2, a.sums + 2 * kTile * kBlock, kItemBytes);
  _tile_stored(3, a.sums + 3 * kTile * kBlock, kItemBytes);
}

MULTIFIRE_AMX inline void dense_sums(const SumsArgs& a, int blocks) {
  if (a.groups % kGroupsOfTile != 0 || blocks != 4) return avx512::dense_sums(a, blocks);
  if (a.pixels > kRows) {
    configure(kRows, a.pixels - kRows);
    for (int block = 0; block < blocks; block += 2)
      two_by_two(a, a.weights + block * a.block_stride, a.sums + block * kTile * kBlock);
  } else {
    configure(a.pixels, a.pixels);
    one_by_four(a);
  }
  _tile_release();
}

// Asks the system for the use of tiles, which a process must do once.
inline bool runs_here() {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  const bool has_tiles = __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) && (edx >> 24 & 3) == 3;
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return has_tiles && avx512::runs_here() && syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

constexpr Kernels kKernels = {"amx", runs_here, dense_sums, portable::sparse_sums, avx512::fire, 0, 0};

}  // namespace amx
}  // namespace multifire_engine_impl

#endif
#endif
