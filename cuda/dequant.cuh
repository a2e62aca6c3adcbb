// From packed codes to the fragments of mma.m16n8k16. Lane (g, q) = (lane / 4, lane % 4) holds rows g
// and g + 8; of every 32 columns it holds the 8 from 8 q on, and one mma takes 4 of them.
//
// Small integers enter as fp16 subnormals: the bits of n are the number n * 2^-24, exactly, so a code
// needs a mask and no arithmetic; the factor returns once per chunk. High nibbles count 16-fold.
#pragma once
#include "tensor.cuh"

constexpr float kSubnormal = 16777216.0f;  // 2^24

struct Fragment { u32 a0, a1, a2, a3; };

// int4: one word is one fragment; low nibbles are row g, high nibbles row g + 8.
__device__ __forceinline__ Fragment int4_fragment(u32 word) {
  const u32 shifted = word >> 8;
  return {word & 0x000f000fu, word & 0x00f000f0u, shifted & 0x000f000fu, shifted & 0x00f000f0u};
}
// int8 (stored + 128): 4 codes of row g and 4 of row g + 8.
__device__ __forceinline__ Fragment int8_fragment(u32 low_row, u32 high_row) {
  return {prmt(low_row, 0, 0x4140), prmt(high_row, 0, 0x4140), prmt(low_row, 0, 0x4342), prmt(high_row, 0, 0x4342)};
}
__device__ __forceinline__ Fragment fp8_fragment(u32 low_row, u32 high_row) {
  return {cvt_rn_f16x2_e4m3x2(low_row & 0xffff), cvt_rn_f16x2_e4m3x2(high_row & 0xffff), cvt_rn_f16x2_e4m3x2(low_row >> 16),
          cvt_rn_f16x2_e4m3x2(high_row >> 16)};
}

template <bool kBf16>
__device__ __forceinline__ void mma(float (&c)[4], const Fragment& a, u32 b0, u32 b1) {
  if constexpr (kBf16) mma_m16n8k16_bf16(c, a.a0, a.a1, a.a2, a.a3, b0, b1);
  else mma_m16n8k16_f16(c, a.a0, a.a1, a.a2, a.a3, b0, b1);
}

// 16-bit activations: rounding to them and back. Values beyond fp16 saturate.
template <bool kBf16>
__device__ __forceinline__ u32 round_pair(float lo, float hi) {
  if constexpr (kBf16) return cvt_rn_bf16x2(lo, hi);
  else return cvt_rn_f16x2(fminf(fmaxf(lo, -65504.0f), 65504.0f), fminf(fmaxf(hi, -65504.0f), 65504.0f));
}
template <bool kBf16>
__device__ __forceinline__ float low_half(u32 pair) {
  if constexpr (kBf16) return __uint_as_float(pair << 16);
  else return cvt_f32_f16(pair & 0xffff);
}
template <bool kBf16>
__device__ __forceinline__ float high_half(u32 pair) {
  if constexpr (kBf16) return __uint_as_float(pair & 0xffff0000u);
  else return cvt_f32_f16(pair >> 16);
}

// The sum of eight values of fp16: what zero points are multiplied with.
__device__ __forceinline__ float sum_of_8(uint4 v) {
  float sum = 0;
  const u32 words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
  for (int i = 0; i < 4; i++) sum += low_half<false>(words[i]) + high_half<false>(words[i]);
  return sum;
}

__device__ __forceinline__ void load_8(const float* at, float (&v)[8]) {
  const uint4 a = ld_cg(reinterpret_cast<const uint4*>(at)), b = ld_cg(reinterpret_cast<const uint4*>(at) + 1);
  const u32 words[8] = {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
#pragma unroll
  for (int i = 0; i < 8; i++) v[i] = __uint_as_float(words[i]);
}

// Eight consecutive columns of one row, dequantized: the embedding's look-up.
template <Matrix m>
__device__ __forceinline__ void dequantize_8(const u8* weights, int row, int col, float (&out)[8]) {
  const int tile = col / m.tile_cols(), in_tile = col % m.tile_cols(), slice = in_tile / 32, q = in_tile % 32 / 8;
  const int g = row % 8, half = row % 16 / 8;
  const u8* base = weights + (u64)(row / 16) * m.row_block_bytes() + (u64)tile * m.tile_bytes();
  if constexpr (m.group == 0) {
    const uint4 v = *reinterpret_cast<const uint4*>(base + slice * 1024 + (row % 16) * 64 + q * 16);
    const u32 words[4] = {v.x, v.y, v.z, v.w};
    for (int i = 0; i < 4; i++) {
      out[2 * i] = low_half<m.bf16()>(words[i]);
      out[2 * i + 1] = high_half<m.bf16()>(words[i]);
    }
  } else {
    const u16* scales = reinterpret_cast<const u16*>(base + m.code_bytes());
    const int group = in_tile / m.group;
    if constexpr (m.type == Type::kInt4) {
      const u8* codes = base + slice / 2 * 512 + (g * 4 + q) * 16 + slice % 2 * 8;
      const u16* pair = scales + group * 32 + g * 4 + half * 2;
      const float scale = cvt_f32_f16(pair[0]), bias = cvt_f32_f16(pair[1]);
      for (int i = 0; i < 8; i++) {  // byte order k0 k2 k1 k3
        const int byte = i / 4 * 4 + i % 2 * 2 + i % 4 / 2;
        out[i] = scale * float(codes[byte] >> 4 * half & 15) + bias;
      }
    } else {
      const u8* codes = base + slice * 512 + (g * 4 + q) * 16 + half * 8;
      const float scale = cvt_f32_f16(scales[group * 16 + g * 2 + half]);
      for (int i = 0; i < 8; i++) {
        if constexpr (m.type == Type::kInt8) out[i] = scale * (float(codes[i]) - 128.0f);
        else out[i] = scale * cvt_f32_f16(cvt_rn_f16x2_e4m3x2(codes[i]) & 0xffff);
      }
    }
  }
}
