// Barriers of a block, and what a warp does together: barriers, shuffles, votes, matrix products.
#pragma once
#include "schedule.h"

namespace emulated {

static void open_gate(Block& b, Gate& g) {
  g.arrived = 0, g.generation++;
  for (u32 w = 0; w < b.warps; w++) make_ready(b, w, g.waiters[w]), g.waiters[w] = 0;
  step(b);
}

static void arrive_at(int id, int threads) {
  Block& b = *block;
  Fiber& f = self();
  f.n_polled = 0;
  Gate& g = b.gate[id];
  if (g.arrived != 0 && g.expected != threads)
    fail("barrier %d for %d threads, but others wait at it for %d (-1: the whole block)", id, threads, g.expected);
  g.expected = threads;
  [[maybe_unused]] u64* order = &g.order[g.generation & 1];
  TSAN(__tsan_release(order));
  if (++g.arrived == (threads < 0 ? b.live_threads : (u32)threads)) {
    open_gate(b, g);
  } else {
    g.waiters[f.warp] |= 1u << f.lane;
    f.number = (u32)id;
    wait(b, State::barrier);
  }
  TSAN(__tsan_acquire(order));
}

void block_barrier() { arrive_at(0, -1); }
void named_barrier(int id, int threads) {
  if (id < 0 || id >= (int)kBarriers || threads <= 0 || threads % 32 != 0)
    fail("bar_sync(%d, %d): the id must be 0 to 15, the threads a multiple of 32", id, threads);
  arrive_at(id, threads);
}

// c[16 x 8] += a[16 x 16] b[16 x 8] for the whole warp at once; fragments as the PTX manual draws them.
template <float (*decode)(u32)>
void multiply(Slot* lane) {
  typedef float Row __attribute__((vector_size(32)));
  float a[16][16];
  Row b[16], c[16];
  for (u32 l = 0; l < 32; l++) {
    const u32 g = l / 4, q = l % 4 * 2;
    const u32* w = lane[l].word;
    for (u32 half = 0; half < 2; half++) {   // k + 0 and k + 1 share a word
      const u32 shift = 16 * half, k = q + half;
      a[g][k] = decode(w[0] >> shift & 0xffff), a[g + 8][k] = decode(w[1] >> shift & 0xffff);
      a[g][k + 8] = decode(w[2] >> shift & 0xffff), a[g + 8][k + 8] = decode(w[3] >> shift & 0xffff);
      b[k][g] = decode(w[4] >> shift & 0xffff), b[k + 8][g] = decode(w[5] >> shift & 0xffff);
      c[g][k] = f32_of_bits(w[6 + half]), c[g + 8][k] = f32_of_bits(w[8 + half]);
    }
  }
  for (u32 m = 0; m < 16; m++)
    for (u32 k = 0; k < 16; k++) c[m] += a[m][k] * b[k];
  for (u32 l = 0; l < 32; l++)
    for (u32 i = 0; i < 4; i++) lane[l].word[6 + i] = bits_of_f32(c[l / 4 + (i / 2) * 8][2 * (l % 4) + i % 2]);
}

static void complete(Block& b, u32 warp, WarpGate& g) {
  Slot* slots = g.slot[g.generation & 1];
  if (g.what == Exchange::mma_bf16) multiply<f32_of_bf16>(slots);
  if (g.what == Exchange::mma_f16) multiply<f32_of_f16>(slots);
  make_ready(b, warp, g.arrived);
  g.arrived = 0, g.generation++;
  if (g.what != Exchange::shuffle && g.what != Exchange::vote) step(b);  // a poll may be shared by shuffles
}

static WarpGate& find_gate(Block& b, u32 warp, u32 mask) {
  for (WarpGate& g : b.warp_gate[warp])
    if (g.mask == mask) return g;
  if (b.warp_gate[warp].size() == b.warp_gate[warp].capacity()) fail("too many different lane masks in one warp");
  b.warp_gate[warp].emplace_back().mask = mask;
  return b.warp_gate[warp].back();
}

static const char* name(Exchange e) {
  return (const char*[]){"__syncwarp", "a shuffle", "a vote", "mma bf16", "mma f16", "movmatrix"}[(u32)e];
}

const Slot* exchange(u32 mask, Exchange what, const u32* mine, u32 words) {
  Block& b = *block;
  Fiber& f = self();
  f.n_polled = 0;
  if ((mask >> f.lane & 1) == 0) fail("%s with mask %08x, which leaves out the lane itself", name(what), mask);
  WarpGate& g = find_gate(b, f.warp, mask);
  if (g.arrived != 0 && g.what != what) fail("%s, while others of the warp are at %s", name(what), name(g.what));
  g.what = what;
  const u32 turn = g.generation & 1;
  for (u32 i = 0; i < words; i++) g.slot[turn][f.lane].word[i] = mine[i];
  g.arrived |= 1u << f.lane;
  if (what == Exchange::warp_barrier) TSAN(__tsan_release(&g.order[turn]));
  if (g.arrived == (mask & b.live[f.warp])) {
    complete(b, f.warp, g);
  } else {
    f.number = mask, f.exchange = what;
    wait(b, State::warp);
  }
  if (what == Exchange::warp_barrier) TSAN(__tsan_acquire(&g.order[turn]));
  return g.slot[turn];
}

void warp_barrier(u32 mask) { exchange(mask, Exchange::warp_barrier, nullptr, 0); }

}  // namespace emulated
