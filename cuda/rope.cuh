// Rotary position embedding. An angle is a fraction of a turn in 64-bit fixed point, so that position
// times frequency is exact modulo whole turns at any position.
#pragma once
#include "config.cuh"

struct Rotation { float cos, sin; };

// turns: one position's advance, in units of 2^-64 turn.
__device__ __forceinline__ Rotation rotation(u64 turns, int position, float scale) {
  const u64 angle = turns * (u64)position;
  const float half_turns = float((long long)angle) * 1.0842021724855044e-19f;  // 2^-63: -1 .. 1
  Rotation r;
  sincospif(half_turns, &r.sin, &r.cos);
  r.cos *= scale;
  r.sin *= scale;
  return r;
}
