// Several columns of activations on their way into shared memory. They are there as rounded vectors, which are
// copied whole, all at once; norms were prepared by whoever wrote the residual (Norms, in exchange.cuh).
#pragma once
#include "norm.cuh"

// Begins to copy the columns of a panel, a column by a warp; columns_landed() waits for them.
template <class Map, Matrix m>
__device__ __forceinline__ void copy_columns(const u16* source, int n_columns, int panel) {
  using C = ActivationsOf<Map, m>;
  using W = ActivationsOf<Map, m>;
  const int begin = panel * W::kPanelTiles * m.tile_cols(), padded = W::tiles(panel) * m.tile_cols();
  const int cols = smaller(padded, m.cols - begin);
  if (W::kPanelsOfBlock > 1) sync_consumers();  // nobody reads the previous panel any more
  if constexpr (kBulkCopy) {
    if (thread_index() % 32 == 0) {
      u64* landed = &Shared<Map>::ring().columns;
      const int warp = thread_index() / 32, columns = n_columns > warp ? ceil_div(n_columns - warp, kWarps) : 0;
      fence_proxy_async_global();  // the copies see what the barrier published
      mbarrier_arrive_expect_tx(landed, columns * cols * 2);
#pragma unroll 1
      for (int column = warp; column < n_columns; column += kWarps)
        cp_async_bulk(C::x(column), source + column * m.cols + begin, cols * 2, landed);
    }
  } else {
#pragma unroll 4
    for (int i = thread_index(); i < n_columns * (cols / 8); i += kConsumers) {
      const int column = i / (cols / 8), k8 = i % (cols / 8);
      reinterpret_cast<uint4*>(C::x(column))[k8] = ld_cg(reinterpret_cast<const uint4*>(source + column * m.cols + begin) + k8);
    }
  }
  if constexpr (m.padded_cols() != m.cols)
#pragma unroll 1
    for (int i = thread_index(); i < n_columns * ((padded - cols) / 8); i += kConsumers)
      reinterpret_cast<uint4*>(C::x(i % n_columns))[cols / 8 + i / n_columns] = make_uint4(0, 0, 0, 0);
}

// Sums over groups of kGroup values in 8 columns: a product with a matrix of ones. What lies in columns that are not
// there stays in their sums. x: [8][stride bytes]; sums: [8][sums_stride].
template <int kGroup>
__device__ __noinline__ void sum_groups(const u8* x, int stride, float* sums, int sums_stride, int groups) {
  constexpr u32 kOne = 0x3c003c00;
  const int lane = thread_index() % 32;
  x += lane / 4 * stride + lane % 4 * 16;
  sums += 2 * lane * sums_stride;
#pragma unroll 4
  for (int group = thread_index() / 32; group < groups; group += kWarps) {
    float even[4] = {}, odd[4] = {};
#pragma unroll
    for (int slice = 0; slice < kGroup / 32; slice++) {
      const uint4 b = *reinterpret_cast<const uint4*>(x + group * kGroup * 2 + slice * 64);
      mma<false>(even, {kOne, kOne, kOne, kOne}, b.x, b.y);
      mma<false>(odd, {kOne, kOne, kOne, kOne}, b.z, b.w);
    }
    if (lane < 4) sums[group] = even[0] + odd[0], sums[sums_stride + group] = even[1] + odd[1];
  }
}

// Waits, and adds the sums over groups that integer weights need.
template <class Map, Matrix m>
__device__ __forceinline__ void columns_landed(Consumer<Map>& consumer, int n_columns, int panel) {
  using C = ActivationsOf<Map, m>;
  if constexpr (kBulkCopy) {
    wait_long<Map>(2 * Map::kStages, consumer.columns_parity, consumer.args.alarm, consumer.args.watchdog_ns);
    consumer.columns_parity ^= 1;
  }
  if constexpr (m.has_sums()) {
    if (!kBulkCopy || m.padded_cols() != m.cols) sync_consumers();  // publishes what other threads wrote
    using W = ActivationsOf<Map, m>;
    sum_groups<m.group>(C::x(0), W::kStride, C::sums(0), W::kSums, W::tiles(panel) * m.tile_cols() / m.group);
  }
  sync_consumers();  // publishes the activations to the block's consumers
}

// The 16-bit activations that the phase before published; their type is what m multiplies with.
template <class Map, Matrix m>
__device__ void load_columns(Consumer<Map>& consumer, const u16* source, int n_columns, int panel) {
  copy_columns<Map, m>(source, n_columns, panel);
  columns_landed<Map, m>(consumer, n_columns, panel);
}

// Takes note of the norms once all of the residual is there. They must be the same in all blocks.
template <class Map>
__device__ __noinline__ void measure_norms(const float* squares, int n_columns) {
  constexpr int kSums = Residual<Map>::kSums;
#pragma unroll 1
  for (int column = thread_index() / 32; column < n_columns; column += kWarps) {
    const uint4* at = reinterpret_cast<const uint4*>(squares + column * kSums);
    float sum = 0;
#pragma unroll 4
    for (int i = thread_index() % 32; i < kSums / 4; i += 32) {
      const uint4 v = ld_cg(at + i);
      sum += (__uint_as_float(v.x) + __uint_as_float(v.y)) + (__uint_as_float(v.z) + __uint_as_float(v.w));
    }
    const float scale = rsqrtf(warp_sum(sum) / model::kDim + model::kNormEps);
    Norms& norms = Norms::here<Map>();
    if (thread_index() % 32 != 0) continue;
    norms.factor[column] = norms.next[column] > 0 ? scale / norms.next[column] : 1;
    norms.next[column] = scale * kNextNorm;
  }
}

// The residual, as prepared for m's norm.
template <class Map, Matrix m>
__device__ void load_normed_columns(Consumer<Map>& consumer, const Residual<Map>& residual, int n_columns, int panel, bool first) {
  copy_columns<Map, m>(residual.rounded, n_columns, panel);
  if (first) measure_norms<Map>(residual.squares, n_columns);
  columns_landed<Map, m>(consumer, n_columns, panel);
}

// The embedding of whole columns, from read(column, k8, v): normed at once, since this block knows the scale.
template <class Map, class Read>
__device__ void store_columns(const Exchange<Map>& exchange, const Residual<Map>& residual, int n_columns, const Reader& reader, Read read) {
  if (thread_index() < 8) Norms::here<Map>().next[thread_index()] = 0;  // the first norm is complete
#pragma unroll 1
  for (int column = blockIdx.x; column < n_columns; column += kGrid) {
    float all = 0;
#pragma unroll 1
    for (int k8 = thread_index(); k8 < model::kDim / 8; k8 += kConsumers) {
      float v[8], squares = 0;
      read(column, k8, v);
#pragma unroll
      for (int j = 0; j < 8; j++) residual.put(exchange, column, k8 * 8 + j, v[j]), squares += v[j] * v[j];
      residual.squares[column * residual.kSums + k8] = squares;
      all += squares;
    }
    const float scale = rsqrtf(block_sum<Map>(all) / model::kDim + model::kNormEps);
#pragma unroll 1
    for (int k8 = thread_index(); k8 < model::kDim / 8; k8 += kConsumers) {
#pragma unroll
      for (int j = 0; j < 8; j++) {
        const int i = k8 * 8 + j;
        residual.put_rounded(column, i, residual.plain[column * model::kDim + i], scale, reader);  // this thread wrote it
      }
    }
    sync_consumers();  // the room of block_sum is free again
  }
}

// For one column or several alike.
template <class Map, Matrix m>
__device__ __forceinline__ void load_normed(Consumer<Map>& consumer, Exchange<Map>& exchange, const Residual<Map>& residual,
                                            const Reader& reader, int n_columns, int panel, bool first) {
  if constexpr (kTagged<Map>) exchange.grid.gave_up = norm_column<Map, m.columns_and_parts()>(exchange, residual, reader.weight);
  else load_normed_columns<Map, m>(consumer, residual, n_columns, panel, first);
}
template <class Map, Matrix m>
__device__ __forceinline__ void load_rounded(Consumer<Map>& consumer, Exchange<Map>& exchange, const Halves<Map, m.cols>& source,
                                             int n_columns, int panel) {
  if constexpr (kTagged<Map>) load_column<Map, m>(exchange, source, panel);
  else load_columns<Map, m>(consumer, source.plain, n_columns, panel);
}
template <class Map, class Read>
__device__ __forceinline__ void embed(const Exchange<Map>& exchange, const Residual<Map>& residual, int n_columns, const Reader& reader, Read read) {
  if constexpr (kTagged<Map>) store_share<Map>(exchange, residual, read);
  else store_columns<Map>(exchange, residual, n_columns, reader, read);
}
