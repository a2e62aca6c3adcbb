// What becomes of the logits as the head makes them. Each is adjusted, and scored: a score is a logit after its
// adjustments, divided by the temperature where there is one.
#pragma once
#include "adjust.cuh"
#include "decide.cuh"

namespace sampler {

// The choice of a step's token: sees every logit of the block, then finishes.
template <class Map>
struct Choice {
  const StepArgs& args;
  const Workspace work;
  const Deal::Share share;  // of the head's row blocks: what this block sees
  const bool filters, ranks;
  Seen seen;

  __device__ __forceinline__ Choice(const StepArgs& args, Deal::Share share)
      : args(args), work(args), share(share), filters(args.filters), ranks(args.logprobs >= 0) {}

  // With one column what is noted is read before the product, so that nobody waits for it.
  __device__ __forceinline__ Noted fetch(int row) const {
    if constexpr (kTagged<Map>) return read_noted(args, row);
    else return {};
  }

  __device__ __forceinline__ void see(int row, int column, float low, float high, Noted noted) {
    if constexpr (!kTagged<Map>) noted = read_noted(args, row);
#pragma unroll 1
    for (int i = 0; i < 2; i++, row += 8, low = high, noted.low = noted.high, noted.allowed >>= 8)
      if (row < model::kVocab) see(low, column, row, noted.low, noted.allowed & 1);
  }

  __device__ __forceinline__ void finish(const Exchange<Map>& exchange) const { decide<Map>(args, share, seen, exchange); }

 private:
  __device__ __forceinline__ float noisy(float score, u32 token) const {
    return args.greedy ? score : score + noise(args.seed, token, args.position + args.n_columns);
  }
  __device__ __forceinline__ void see(float logit, int column, u32 token, uint2 noted, bool allowed) {
    const bool last_column = column == args.n_columns - 1;
    if (args.logits || (ranks && last_column)) work.logits()[(u64)column * model::kVocab + token] = logit;
    if (!last_column) return;
    if (ranks) seen.top_logit = fmaxf(seen.top_logit, logit);
    if (args.adjust || args.mask) logit = adjusted(args, logit, noted, allowed);
    const float score = args.greedy ? logit : logit / args.temperature;
    if (score == -kInfinity) {
      seen.best.offer(score, kExcluded);
    } else if (!filters) {
      seen.best.offer(noisy(score, token), token);
    }
    if (filters) {
      work.scores()[token] = score;
      seen.top_score = fmaxf(seen.top_score, score);
    }
  }
};

}  // namespace sampler
