// mbarriers and asynchronous copies.
#pragma once
#include "schedule.h"

namespace emulated {

u8* dynamic_smem() { return block->smem; }
u32 smem_offset(const void* p) { return (u32)(static_cast<const u8*>(p) - block->smem); }

static void check_smem(const char* what, const void* p, u64 bytes, u64 align) {
  Block& b = *block;
  u64 at = (u64)(static_cast<const u8*>(p) - b.smem);
  if (at >= b.launch.smem_bytes || bytes > b.launch.smem_bytes - at)
    fail("%s: %llu bytes at offset %lld lie outside of the block's %llu bytes of shared memory", what, bytes,
         (long long)at, b.launch.smem_bytes);
  if (at % align != 0) fail("%s: offset %llu is not a multiple of %llu", what, at, align);
}

static Mbarrier& as_mbarrier(const char* what, u64* p) {
  check_smem(what, p, 8, 8);
  u32 place = smem_offset(p) / 8;
  if ((block->mbarrier_set[place / 64] >> place % 64 & 1) == 0) fail("%s at offset %u: no mbarrier_init", what, place * 8);
  TSAN(__tsan_read_range(p, 8));   // orders it after mbarrier_init
  return *reinterpret_cast<Mbarrier*>(p);
}

static void settle(Block& b, u64* p) {
  Mbarrier& m = *reinterpret_cast<Mbarrier*>(p);
  if (m.pending != 0 || m.bytes != 0) return;
  m.pending = m.expected, m.phase ^= 1;
  for (u32 w = 0; w < b.warps; w++)
    for (u32 lanes = b.waiting[w]; lanes != 0; lanes &= lanes - 1) {
      u32 lane = (u32)__builtin_ctz(lanes);
      const Fiber& f = b.fiber[w * 32 + lane];
      if (f.mbarrier == p && m.phase != f.number) make_ready(b, w, 1u << lane);
    }
  step(b);
}

void mbarrier_init(u64* p, u32 arrivals) {
  check_smem("mbarrier_init", p, 8, 8);
  if (arrivals == 0 || arrivals >= 1u << 20) fail("mbarrier_init for %u arrivals", arrivals);
  u32 place = smem_offset(p) / 8;
  block->mbarrier_set[place / 64] |= 1ull << place % 64;
  TSAN(__tsan_write_range(p, 8));
  *reinterpret_cast<Mbarrier*>(p) = {arrivals, arrivals, 0, 0};
}

static void count_arrival(Block& b, u64* p) {
  Mbarrier& m = *reinterpret_cast<Mbarrier*>(p);
  if (m.pending == 0)
    fail("an arrival too many at the mbarrier at offset %u: all %u of this phase came, %d bytes have not landed",
         smem_offset(p), (u32)m.expected, (int)m.bytes);
  m.pending--;
  settle(b, p);
}

void mbarrier_arrive(u64* p, u32 expect_bytes) {
  Mbarrier& m = as_mbarrier("mbarrier_arrive", p);
  self().n_polled = 0;
  if (expect_bytes >= 1u << 20) fail("mbarrier_arrive_expect_tx of %u bytes: the count holds less than 1 MiB", expect_bytes);
  TSAN(__tsan_release(p));
  m.bytes += expect_bytes;
  count_arrival(*block, p);
  let_others_run(*block);
}

bool mbarrier_wait(u64* p, u32 parity) {
  Mbarrier& m = as_mbarrier("mbarrier wait", p);
  Fiber& f = self();
  if (parity > 1) fail("a wait for parity %u of the mbarrier at offset %u: 0 or 1", parity, smem_offset(p));
  f.n_polled = 0;
  if (m.phase == parity) {
    f.mbarrier = p, f.number = parity;
    wait(*block, State::mbarrier);
  }
  if (m.phase == parity) return false;
  TSAN(__tsan_acquire(p));
  return true;
}

// Not memcpy and memset: the sanitizers would take them for accesses of the fiber that happens to wait.
static void move(u8* dst, const u8* src, u32 bytes) {
  typedef u64 __attribute__((may_alias)) Word;
  for (u32 i = 0; i < bytes; i += 8) *reinterpret_cast<Word*>(dst + i) = *reinterpret_cast<const Word*>(src + i);
}

static void issue(Block& b, const char* what, void* dst, const void* src, u32 bytes, u64* mbarrier) {
  check_smem(what, dst, bytes, 16);
  if (bytes == 0 || bytes % 16 != 0 || reinterpret_cast<uintptr_t>(src) % 16 != 0)
    fail("%s of %u bytes from %p: size and source must be multiples of 16", what, bytes, src);
  const u32 first = smem_offset(dst) / 16;
  for (u32 i = first; i < first + bytes / 16; i++) {
    if (b.landing[i / 64] >> i % 64 & 1) fail("%s to offset %u, where another copy has not landed yet", what, i * 16);
    b.landing[i / 64] |= 1ull << i % 64;
  }
  ASAN(if (__asan_region_is_poisoned(const_cast<void*>(src), bytes))
         fail("%s reads %u bytes at %p, past the end of a buffer", what, bytes, src));
  TSAN(__tsan_read_range(const_cast<void*>(src), bytes));
  TSAN(__tsan_write_range(dst, bytes));
  typedef u64 __attribute__((may_alias)) Word;
  for (u32 i = 0; i < bytes / 8; i++) static_cast<Word*>(dst)[i] = 0x0101010101010101u * kPoison;
  Fiber& f = self();
  const u8* source = static_cast<const u8*>(src);
  if (b.random() % 2) {   // the device reads the source at any time from now on
    u8* snapshot = b.snapshot.data() + smem_offset(dst);
    move(snapshot, source, bytes);
    source = snapshot;
  }
  b.in_flight.push_back({static_cast<u8*>(dst), source, bytes, mbarrier, f.warp * 32 + f.lane, b.copies++, f.groups});
}

void copy_bulk(void* dst, const void* src, u32 bytes, u64* p) {
  as_mbarrier("cp_async_bulk", p);
  issue(*block, "cp_async_bulk", dst, src, bytes, p);
  TSAN(__tsan_release(p));
}
void copy_16(void* dst, const void* src) {
  issue(*block, "cp_async_16", dst, src, 16, nullptr);
  Fiber& f = self();
  f.unlanded++, f.group_unlanded[f.groups % kGroups]++;
}

// Arrives when every cp_async_16 that this thread issued before has landed.
void copy_16_arrive(u64* p) {
  Block& b = *block;
  as_mbarrier("cp_async_mbarrier_arrive_noinc", p);
  TSAN(__tsan_release(p));
  const u32 me = self().warp * 32 + self().lane, remaining = self().unlanded;
  if (remaining == 0) return count_arrival(b, p);
  if (b.arrivals.size() == b.arrivals.capacity()) fail("too many cp_async_mbarrier_arrive_noinc pending");
  b.arrivals.push_back({p, me, remaining, b.copies});
}

void copy_16_commit() {
  Fiber& f = self();
  if (f.group_unlanded[++f.groups % kGroups] != 0) fail("cp_async_commit_group: %u groups before have not landed", kGroups);
}

static bool groups_landed(const Fiber& f, u64 end) {
  for (u64 k = end < kGroups ? 0 : end - kGroups; k < end; k++)
    if (k + kGroups > f.groups && f.group_unlanded[k % kGroups] != 0) return false;
  return true;
}

// Returns when at most `pending` of the groups that this thread committed have not landed.
void copy_16_wait(u32 pending) {
  Fiber& f = self();
  f.n_polled = 0;
  if (f.groups <= pending) return;
  f.wanted_groups = f.groups - pending, f.mbarrier = nullptr;
  while (!groups_landed(f, f.wanted_groups)) wait(*block, State::copies);
}

static void land_one(Block& b) {
  const u64 i = b.random() % b.in_flight.size();
  const Copy c = b.in_flight[i];
  b.in_flight[i] = b.in_flight.back();
  b.in_flight.pop_back();
  move(c.dst, c.src, c.bytes);
  const u32 first = (u32)(c.dst - b.smem) / 16;
  for (u32 place = first; place < first + c.bytes / 16; place++) b.landing[place / 64] &= ~(1ull << place % 64);
  step(b);
  if (c.mbarrier != nullptr) {
    reinterpret_cast<Mbarrier*>(c.mbarrier)->bytes -= c.bytes;
    return settle(b, c.mbarrier);
  }
  Fiber& owner = b.fiber[c.fiber];
  owner.unlanded--, owner.group_unlanded[c.group % kGroups]--;
  if (owner.state == State::copies && groups_landed(owner, owner.wanted_groups)) make_ready(b, owner.warp, 1u << owner.lane);
  for (u64 k = 0; k < b.arrivals.size();) {
    CopyArrival& a = b.arrivals[k];
    if (a.fiber != c.fiber || a.before <= c.number || --a.remaining != 0) {
      k++;
      continue;
    }
    u64* mbarrier = a.mbarrier;
    a = b.arrivals.back();
    b.arrivals.pop_back();
    count_arrival(b, mbarrier);
  }
}

}  // namespace emulated
