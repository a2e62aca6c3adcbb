// Random numbers that depend on a seed, a position and a token alone, as minflash/sampling.py has them.
#pragma once
#include "config.cuh"

namespace sampler {
// Philox4x32-10 for the counter (token / 4, position, 0, 0): a word for each of four neighbouring tokens.
struct Words { u32 of[4]; };
__device__ __forceinline__ Words random_words(u64 seed, u32 token, u32 position) {
  u32 c[4] = {token / 4, position, 0, 0}, k0 = (u32)seed, k1 = (u32)(seed >> 32);
#pragma unroll 1
  for (int round = 0; round < 10; round++) {
    const u64 p0 = (u64)0xD2511F53u * c[0], p1 = (u64)0xCD9E8D57u * c[2];
    const u32 c0 = (u32)(p1 >> 32) ^ c[1] ^ k0, c2 = (u32)(p0 >> 32) ^ c[3] ^ k1;
    c[1] = (u32)p1, c[3] = (u32)p0, c[0] = c0, c[2] = c2;
    k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
  }
  return {{c[0], c[1], c[2], c[3]}};
}
__device__ __forceinline__ float gumbel(u32 bits) {
  const float v = fminf((float(bits) + 0.5f) * 2.3283064365386963e-10f, 0.99999994f);
  return -logf(-log1pf(-v));
}
__device__ __noinline__ float noise(u64 seed, u32 token, u32 position) {
  const Words words = random_words(seed, token, position);
  const u32 word = token % 4;
  return gumbel(word == 0 ? words.of[0] : word == 1 ? words.of[1] : word == 2 ? words.of[2] : words.of[3]);
}
}  // namespace sampler
