// The tail of a step: from the logits, of which each block has made some, to the next token. The algorithm is
// minflash/sampling.py's, word for word. Greedy and plain temperature need one candidate per block. Filters and
// log-probabilities rank values of the whole vocabulary (ranking.cuh): blocks tell each other their largest
// values, then meet once.
#pragma once
#include "noise.cuh"
#include "ranking.cuh"

constexpr u32 kNoToken = 0xffffffffu;   // no logit is a number
constexpr u32 kExcluded = 0xfffffffeu;  // all tokens are excluded

struct Candidate {
  float score = -kInfinity;
  u32 token = kNoToken;
  __device__ __forceinline__ void offer(float s, u32 t) {
    if (s > score || (s == score && t < token)) score = s, token = t;
  }
};

// What a step tells about log-probabilities: those of the likeliest tokens, and of the chosen one, are
// their logits less `top` less the logarithm of total * 2^-44. In host memory, under the step's ticket.
struct Report {
  u64 total;
  float top, chosen;  // logits
  struct { u32 token; float logit; } likeliest[kMostLogprobs];
};

namespace sampler {
using namespace ranking;

// The best of the block's candidates; all threads have it.
template <class Map>
__device__ __noinline__ Candidate best_of_block(Candidate mine) {
#pragma unroll
  for (int i = 16; i; i /= 2) {
    const float s = __shfl_xor_sync(0xffffffffu, mine.score, i);
    const u32 t = __shfl_xor_sync(0xffffffffu, mine.token, i);
    mine.offer(s, t);
  }
  Candidate* warps = reinterpret_cast<Candidate*>(Shared<Map>::scratch() + Map::kReduce);  // [kWarps]
  sync_consumers();  // the room is free
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = mine;
  sync_consumers();  // publishes the warps' candidates
#pragma unroll
  for (int w = 0; w < kWarps; w++) mine.offer(warps[w].score, warps[w].token);
  return mine;
}

// What a block has seen of the step's scores and logits.
struct Seen {
  Candidate best;  // of what no filter may drop
  float top_score = -kInfinity, top_logit = -kInfinity;
};

// From there to the token.
template <class Map>
struct Decision {
  const StepArgs& args;
  const Workspace work;
  const Deal::Share share;  // of the head's row blocks: what this block has seen, and ranks
  const bool filters, ranks;
  Candidate best;
  float top_score, top_logit;
  u32 least_key = 0;  // what min_p asks for

  __device__ __forceinline__ Decision(const StepArgs& args, Deal::Share share, const Seen& seen)
      : args(args), work(args), share(share), filters(args.filters), ranks(args.logprobs >= 0), best(seen.best),
        top_score(seen.top_score), top_logit(seen.top_logit) {}

  // Tells the next launch and the host.
  __device__ __forceinline__ void make(Exchange<Map>& exchange) {
    Bounds bounds{};
    if (filters || ranks) {
      empty_bins();
      agree_on_tops(exchange);
      fill_bins();
      if (kRounds == 1 && filters) each_kept([&](Quad& quad) { draw(quad); });  // while the bins are on their way
      exchange.grid.sync();  // publishes the bins
      bounds = find_bounds<Map>(work.tail()->bins, top_k(), filters ? args.top_p : 1, ranks ? n_likeliest() : 0);
      sort_out(bounds);
    }
    u64 entries = 0;
    if (!arrives_last(entries)) return;
    if (filters && (u32)entries) settle(bounds, (u32)entries);
    if (ranks) report_likeliest(entries >> 32);
    if (filters || ranks) sync_consumers();  // the report is complete
    if (threadIdx.x == 0) tell();
    if (filters || ranks) leave_empty();
  }

 private:
  // Four neighbouring tokens of those that the block has seen, without regard to what thread has. A thread has kQuads of
  // them, reads kKept at a time, and keeps them where those are all.
  struct Quad {
    int token;                 // the first; kVocab: there are none
    float score[4], logit[4];  // what nobody asks for is -infinity
    int bin[4], logit_bin[4];  // kNoBin: of none
    float drawn[4];            // the scores with their noise
  };
  static constexpr int kQuads = ceil_div(ceil_div(tensors::head.row_blocks(), kGrid) * 4, kConsumers);
  static constexpr int kKept = smaller(kQuads, 2), kRounds = ceil_div(kQuads, kKept), kNoBin = kBins + 1;
  Quad kept[kKept];

  __device__ __forceinline__ float* last_logits() const { return work.logits() + (u64)(args.n_columns - 1) * model::kVocab; }
  // 0: all.
  __device__ __forceinline__ u32 top_k() const { return filters && args.top_k > 0 && args.top_k < model::kVocab ? args.top_k : 0; }
  __device__ __forceinline__ u32 n_likeliest() const { return smaller(args.logprobs, model::kVocab); }

  __device__ __forceinline__ void read(int round) {
#pragma unroll
    for (int k = 0; k < kKept; k++) {
      const int place = (round * kKept + k) * kConsumers + threadIdx.x;  // four to a row block
      kept[k].token = place < 4 * share.count ? (share.first + place / 4 * kGrid) * 16 + place % 4 * 4 : model::kVocab;
#pragma unroll
      for (int j = 0; j < 4; j++) {
        const int token = kept[k].token + j;
        kept[k].score[j] = filters && token < model::kVocab ? ld_cg(work.scores() + token) : -kInfinity;
        kept[k].logit[j] = ranks && token < model::kVocab ? ld_cg(last_logits() + token) : -kInfinity;
      }
    }
  }
  __device__ __forceinline__ void find_bins(Quad& quad) const {
#pragma unroll
    for (int j = 0; j < 4; j++) {
      quad.bin[j] = quad.score[j] > -kInfinity ? bin_of(top_score, quad.score[j]) : kNoBin;
      quad.logit_bin[j] = quad.logit[j] > -kInfinity ? bin_of(top_logit, quad.logit[j]) : kNoBin;
    }
  }
  __device__ __forceinline__ void draw(Quad& quad) const {
    if (quad.token >= model::kVocab) return;
    const Words words = random_words(args.seed, quad.token, args.position + args.n_columns);
#pragma unroll
    for (int j = 0; j < 4; j++) quad.drawn[j] = quad.score[j] + gumbel(words.of[j]);
  }
  // Calls use(quad) for those that are kept, and leaves them in their places.
  template <class Use>
  __device__ __forceinline__ void each_kept(Use use) {
#pragma unroll 1
    for (int k = 0; k < kKept; k++) {
      Quad quad = kept[0];
      use(quad);
#pragma unroll
      for (int i = 1; i < kKept; i++) kept[i - 1] = kept[i];
      kept[kKept - 1] = quad;
    }
  }

  // The block's bins in shared memory. The lists have been in device memory since the step before; what is read
  // of a line that is not written as a whole would be waited for.
  __device__ __forceinline__ void empty_bins() {
    static_assert(sizeof(Bins) <= Map::kReduce, "the bins take scratch, as _RANKING_BYTES of tuning.py says");
    uint4* vectors = reinterpret_cast<uint4*>(Shared<Map>::scratch());
#pragma unroll 1
    for (int i = threadIdx.x; i < sizeof(Bins) / 16; i += kConsumers) vectors[i] = make_uint4(0, 0, 0, 0);
    const int line = threadIdx.x * (128 / int(sizeof(Entry)));
    if (blockIdx.x == 0 && line < model::kVocab) prefetch_l2(work.listed() + line), prefetch_l2(work.ranked() + line);
  }

  // The largest values of all blocks: each tells its own in words with the number of the phase.
  __device__ __forceinline__ void agree_on_tops(Exchange<Map>& exchange) {
    const Tops mine = largest<Map>({ordered(top_score), ordered(top_logit)}, 0);
    u64* words = work.tops();  // [kGrid][2]
    if (threadIdx.x == 0) exchange.put(words + 2 * blockIdx.x, mine.score), exchange.put(words + 2 * blockIdx.x + 1, mine.logit);
    if (kRounds == 1) read(0);  // while those are on their way
    Tops all = mine;
#pragma unroll 1
    for (int block = threadIdx.x; block < kGrid; block += kConsumers) {
      u32 keys[2];
      exchange.get({words + 2 * block, words + 2 * block + 1}, 0, keys);
      all = {max(all.score, keys[0]), max(all.logit, keys[1])};
    }
    all = largest<Map>(all, 1);
    top_score = unordered(all.score), top_logit = unordered(all.logit);
    if (args.min_p > 0) least_key = ordered(top_score + logf(args.min_p));
  }

  // Counts the block's part in shared memory, as far as it is asked for, then adds that to the grid's bins.
  __device__ __forceinline__ void fill_bins() {
    Bins& bins = *reinterpret_cast<Bins*>(Shared<Map>::scratch());
    const bool counts = top_k(), weighs = args.top_p < 1;
    u64 total = 0;
#pragma unroll 1
    for (int round = 0; round < kRounds; round++) {
      if (kRounds > 1) read(round);
      each_kept([&](Quad& quad) {
        find_bins(quad);
#pragma unroll
        for (int j = 0; j < 4; j++) {
          if (quad.bin[j] < kBins) {
            if (counts) atomicAdd(bins.count + quad.bin[j], 1u);
            if (weighs) add_wide(bins.weight + quad.bin[j], weight_of(quad.score[j], top_score));
          }
          if (quad.logit_bin[j] < kBins) {
            atomicAdd(bins.logits + quad.logit_bin[j], 1u);
            total += weight_of(quad.logit[j], top_logit, 17592186044416.0f);
          }
        }
      });
    }
    sync_consumers();  // publishes the block's bins
    Bins& all = work.tail()->bins;
#pragma unroll
    for (int i = 0; i < kEach; i++) {
      const int bin = threadIdx.x + i * kConsumers;
      if (bins.weight[bin]) red_add(all.weight + bin, bins.weight[bin]);
      if (bins.count[bin]) red_add(all.count + bin, bins.count[bin]);
      if (bins.logits[bin]) red_add(all.logits + bin, bins.logits[bin]);
    }
    if (!ranks) return;
    total = sum_before<Map>(total).all;
    if (threadIdx.x == 0) red_add(&all.total, total);
  }

  // Scores that are kept for certain become candidates; those at the edge are listed, and so are the
  // likeliest logits: all of a block's side by side.
  __device__ __forceinline__ void sort_out(const Bounds& bounds) {
    const auto is_listed = [&](int bin) { return bin >= bounds.first && bin <= bounds.last; };
    const auto is_likely = [&](int bin) { return bin <= bounds.ranked; };
#pragma unroll 1
    for (int round = 0; round < kRounds; round++) {
      if (kRounds > 1) {
        read(round);
        each_kept([&](Quad& quad) {
          find_bins(quad);
          if (filters) draw(quad);
        });
      }
      u64 mine = 0, begin = 0;
      each_kept([&](Quad& quad) {
#pragma unroll
        for (int j = 0; j < 4; j++) mine += (u64)is_likely(quad.logit_bin[j]) << 32 | is_listed(quad.bin[j]);
      });
      const Sums sums = sum_before<Map>(mine);
      if (sums.all && threadIdx.x == 0) begin = atom_add(&work.tail()->entries, sums.all);
      each_kept([&](Quad& quad) {  // while that is on its way
#pragma unroll
        for (int j = 0; j < 4; j++)
          if (quad.bin[j] < bounds.first && ordered(quad.score[j]) >= least_key) best.offer(quad.drawn[j], quad.token + j);
      });
      if (!sums.all) continue;
      if (threadIdx.x == 0) told<Map, u64>() = begin;
      sync_consumers();  // publishes where the block's entries begin
      begin = told<Map, u64>() + sums.before;
      u32 at = (u32)begin, at_likely = begin >> 32;
      each_kept([&](Quad& quad) {
#pragma unroll
        for (int j = 0; j < 4; j++) {
          if (is_listed(quad.bin[j])) work.listed()[at++] = Entry::of(quad.score[j], quad.token + j, quad.drawn[j], weight_of(quad.score[j], top_score));
          if (is_likely(quad.logit_bin[j])) work.ranked()[at_likely++] = Entry::of(quad.logit[j], quad.token + j, 0, 0);
        }
      });
    }
  }

  // Blocks hand in their candidates; the last one to arrive goes on with the best of them. `entries` become
  // those of the lists.
  __device__ __forceinline__ bool arrives_last(u64& entries) {
    u32* arrivals = work.arrivals() + kMaxTeams;
    best = best_of_block<Map>(best);
    if (threadIdx.x == 0) {
      work.candidates()[blockIdx.x] = best;
      const bool last = atom_add_acq_rel_gpu(arrivals, 1) == kGrid - 1;  // publishes candidates, lists and logits
      told<Map, u32>() = last;
      if (last) *arrivals = 0;
    }
    sync_consumers();  // publishes who decides
    if (!told<Map, u32>()) return false;
    if (filters || ranks) entries = ld_cg(&work.tail()->entries);
    best = Candidate();
#pragma unroll 1
    for (int i = threadIdx.x; i < kGrid; i += kConsumers) {
      const uint2 other = ld_cg(reinterpret_cast<const uint2*>(work.candidates() + i));
      best.offer(__uint_as_float(other.x), other.y);
    }
    best = best_of_block<Map>(best);
    return true;
  }

  // Where in the listed bins the filters end.
  __device__ __forceinline__ void settle(const Bounds& bounds, u32 count) {
    const List list = bring<Map>(work.listed(), count);
    Measure measure{true, 0};
    u32 least = least_key;
    u64 goal = bounds.rank;
#pragma unroll 1
    for (int filter = 0; filter < 2; filter++) {  // top_k, top_p
      if (goal) {
        const u32 key = count <= kShort ? select_of_few<Map>(list, goal, measure) : (u32)select<Map>(list, false, goal, measure);
        if (measure.counts) measure.least = key;
        least = max(least, key);
      }
      measure.counts = false, goal = 0;
      if (filter == 0 && args.top_p < 1) goal = share_of(args.top_p, mass(bounds, list, measure)) - bounds.weight;
    }
    each_entry(list.entries, count, [&](u32, Entry entry) {
      if (entry.key >= least) best.offer(entry.drawn, entry.token);
    });
    best = best_of_block<Map>(best);
  }

  // The weights of all that top_k keeps.
  __device__ __forceinline__ u64 mass(const Bounds& bounds, const List& list, const Measure& measure) const {
    if (!bounds.rank) return bounds.total;
    u64 listed = 0;
    each_entry(list.entries, list.count, [&](u32, Entry entry) { listed += measure(entry); });
    return bounds.weight + sum_before<Map>(listed).all;
  }

  // Each of the likeliest logits finds its place by counting those before it. Where many logits are listed,
  // as many are equal, the others are left out first.
  __device__ __forceinline__ void report_likeliest(u32 count) {
    Report* report = reinterpret_cast<Report*>(args.report);
    const float chosen = best.token < (u32)model::kVocab ? ld_cg(last_logits() + best.token) : 0;
    const Entry* list = work.ranked();
    u64 least = 0;
    if (count > kConsumers && n_likeliest()) {
      const List near = bring<Map>(list, count);
      list = near.entries;
      least = select<Map>(near, true, n_likeliest(), {true, 0});
    }
    Entry* some = reinterpret_cast<Entry*>(Shared<Map>::scratch());  // [kConsumers]
    if (threadIdx.x == 0) told<Map, u32>() = 0;
    sync_consumers();  // publishes that nothing is taken yet, and the scratch is free
    each_entry(list, count, [&](u32, Entry entry) {
      if (order_of(entry) >= least) some[atomicAdd(&told<Map, u32>(), 1u)] = entry;
    });
    sync_consumers();  // publishes what is taken
    const u32 taken = told<Map, u32>();
    if (threadIdx.x < taken) {
      const Entry mine = some[threadIdx.x];
      u32 place = 0;
#pragma unroll 4
      for (u32 j = 0; j < taken; j++) place += order_of(some[j]) > order_of(mine);
      if (place < n_likeliest()) report->likeliest[place] = {mine.token, unordered(mine.key)};
    }
    if (threadIdx.x == 0) report->total = ld_cg(&work.tail()->bins.total), report->top = top_logit, report->chosen = chosen;
  }

  // For the next step that ranks. All blocks have read the bins: they arrived afterwards.
  __device__ __forceinline__ void leave_empty() {
    u64* words = reinterpret_cast<u64*>(work.tail());
#pragma unroll 1
    for (int i = threadIdx.x; i < sizeof(Tail) / 8; i += kConsumers) words[i] = 0;
  }

  __device__ __forceinline__ void tell() {
    const bool chosen = best.token < (u32)model::kVocab;
    const u32 word = args.adjust && chosen ? ld_cg(&work.noted()[best.token].x) : 0;
    *work.next_token() = chosen ? best.token : 0;  // else the host will say so
    st_release_sys(reinterpret_cast<u64*>(args.mailbox), (u64)args.ticket << 32 | best.token);
    if (args.adjust && chosen) work.noted()[best.token].x = word + 1;
  }
};

// A function of its own, so that the layers before it compile to the same code whatever is done here.
template <class Map>
__device__ __noinline__ void decide(const StepArgs& args, Deal::Share share, Seen seen, Exchange<Map> exchange) {
  Decision<Map>(args, share, seen).make(exchange);
}

}  // namespace sampler
