// What happens to a logit before a token is chosen: steps a to e of minflash/sampling.py.
#pragma once
#include "norm.cuh"

namespace sampler {
// A word a token: how often the answer has it (low bits), and these.
constexpr u32 kInPrompt = 0x80000000u, kEndsAnswer = 0x40000000u, kCount = 0x3fffffffu;

// What the host and earlier steps noted of the tokens `row` and `row` + 8.
struct Noted {
  uint2 low, high;  // word, bias
  u32 allowed;      // bits 0 and 8: those of the mask
};
__device__ __forceinline__ Noted read_noted(const StepArgs& args, int row) {
  const Workspace work(args);
  Noted noted{{0, 0}, {0, 0}, 0xffffffffu};
  if (args.adjust) noted.low = ld_cg(work.noted() + smaller(row, model::kVocab - 1)), noted.high = ld_cg(work.noted() + smaller(row + 8, model::kVocab - 1));
  if (args.mask) noted.allowed = ld_cg(work.mask() + smaller(row, model::kVocab - 1) / 32) >> row % 32;
  return noted;
}

// Steps a to e of sampling.py, each rounded on its own as there.
__device__ __forceinline__ float adjusted(const StepArgs& args, float logit, uint2 noted, bool allowed) {
  if (args.adjust) {
    logit = __fadd_rn(logit, __uint_as_float(noted.y));
    if (noted.x & (kInPrompt | kCount)) logit = logit > 0 ? logit / args.repetition : __fmul_rn(logit, args.repetition);
    const float count = float(noted.x & kCount);
    if (count > 0) logit = __fadd_rn(logit, -__fadd_rn(args.presence, __fmul_rn(args.frequency, count)));
    if (args.ban_ends && noted.x & kEndsAnswer) logit = -kInfinity;
  }
  return allowed ? logit : -kInfinity;
}
}  // namespace sampler
