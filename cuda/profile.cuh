// Where a step's time goes: the clock of each block's first consumer at the turns of every phase.
// Compiled out unless codegen was asked for it; minflash bench --profile reads the marks.
#pragma once
#include "config.cuh"

enum Mark { kBegin, kLoaded, kStreamed, kWritten, kMarks };  // the next phase's begin ends the barrier

struct Profile {
  const StepArgs& args;
  int phase = 0;
  __device__ __forceinline__ explicit Profile(const StepArgs& args) : args(args) {}
  __device__ __forceinline__ void mark([[maybe_unused]] Mark what) {
    if constexpr (kProfile) {
      if (threadIdx.x == 0) Workspace(args).profile()[(blockIdx.x * kPhases + phase) * kMarks + what] = clock64_now();
      if (what == kWritten) phase++;
    }
  }
};
