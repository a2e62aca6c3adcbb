// A prompt, hundreds of tokens in one launch: fills the KV cache and computes no logits.
//
// One block an SM, a grid barrier between phases. The last layer ends with its keys and values.
#include "prefill_attention.cuh"

namespace prompt {

// Eight values of a column: rounded, summed, and summed over the lanes of a group.
template <bool kBf16>
__device__ __forceinline__ uint4 round_8(const float (&v)[8]) {
  return make_uint4(round_pair<kBf16>(v[0], v[1]), round_pair<kBf16>(v[2], v[3]), round_pair<kBf16>(v[4], v[5]), round_pair<kBf16>(v[6], v[7]));
}

template <Matrix m>
__device__ __forceinline__ float group_sum(uint4 v) {
  float sum = sum_of_8(v);
#pragma unroll
  for (int i = 1; i < m.group / 8; i *= 2) sum += __shfl_xor_sync(0xffffffffu, sum, i);
  return sum;
}

// Eight activations at `to`, and for integer weights their group's sum: all lanes of a warp, with consecutive k8.
template <Matrix m>
__device__ __forceinline__ void put(const gemm::Operand<m>& x, u32* to, int column, int k8, uint4 v) {
  if (k8 < m.padded_cols() / 8) x.put_8(to, v);
  if constexpr (m.has_sums()) {
    const float sum = group_sum<m>(v);
    if (k8 < m.padded_cols() / 8 && k8 % (m.group / 8) == 0) *x.sum(column, k8 * 8 / m.group) = sum;
  }
}

// The first of a warp's columns, which are kGrid * kWarps apart.
__device__ __forceinline__ int first_column() { return threadIdx.x / 32 * kGrid + blockIdx.x; }

// A lane has the same elements of the residual here and in norm(): no barrier is needed between them.
__device__ void embed(const u8* weights, const int* tokens, float* residual, int n_columns) {
#pragma unroll 1
  for (int column = first_column(); column < n_columns; column += kGrid * kWarps)
#pragma unroll 1
    for (int k8 = threadIdx.x % 32; k8 < model::kDim / 8; k8 += 32) {
      float v[8];
      dequantize_8<tensors::embed>(weights, tokens[column], k8 * 8, v);
      float4* at = reinterpret_cast<float4*>(residual + (u64)column * model::kDim + k8 * 8);
      at[0] = make_float4(v[0], v[1], v[2], v[3]);
      at[1] = make_float4(v[4], v[5], v[6], v[7]);
    }
}

// Phases that are short take no registers from the products: they are not inlined.

// RMSNorm(residual) * weight, rounded for m: a warp for each column, which keeps what fits into registers.
template <Matrix m>
__device__ __noinline__ void norm(const float* weight, const float* residual, gemm::Operand<m> x, int n_columns) {
  constexpr int kEnd = model::kDim / 8, kRounds = ceil_div(m.padded_cols() / 8, 32), kBatch = smaller(kRounds, 16), kWeights = 4;
  const int lane = threadIdx.x % 32;
  float v[kBatch][8], w[kWeights][8];
  const auto read = [&](const float* from, int round, float (&v)[8]) {
    const int k8 = round * 32 + lane;
    if (k8 < kEnd) return load_8(from + k8 * 8, v);
#pragma unroll
    for (int i = 0; i < 8; i++) v[i] = 0;
  };
  const auto read_batch = [&](const float* from, int round) {  // all on their way before the first is needed
#pragma unroll
    for (int i = 0; i < kBatch; i++) read(from, round + i, v[i]);
  };
  const auto read_weights = [&](int round) {
#pragma unroll
    for (int i = 0; i < kWeights; i++) read(weight, round + i, w[i]);
  };
#pragma unroll 1
  for (int column = first_column(); column < n_columns; column += kGrid * kWarps) {
    const float* from = residual + (u64)column * model::kDim;
    u8* to = reinterpret_cast<u8*>(x.pair(column, lane * 8));
    float squares = 0;
    read_weights(0);
#pragma unroll 1
    for (int round = 0; round < kRounds; round += kBatch) {
      read_batch(from, round);
#pragma unroll
      for (int i = 0; i < kBatch * 8; i++) squares += v[i / 8][i % 8] * v[i / 8][i % 8];
    }
    const float scale = rsqrtf(warp_sum(squares) / model::kDim + model::kNormEps);
#pragma unroll 1
    for (int round = 0; round < kRounds; round += kBatch) {
      if (kRounds > kBatch) read_batch(from, round);
#pragma unroll
      for (int i = 0; i < kBatch; i++) {
        if (i % kWeights == 0 && round + i > 0) read_weights(round + i);
#pragma unroll
        for (int j = 0; j < 8; j++) v[i][j] *= scale * w[i % kWeights][j];
        put<m>(x, reinterpret_cast<u32*>(to + x.rows_further((round + i) * 32)), column, (round + i) * 32 + lane, round_8<m.bf16()>(v[i]));
      }
    }
  }
}

__device__ __forceinline__ float2 biased(const float* bias, int row, float2 v) { return bias ? make_float2(v.x + bias[row], v.y + bias[row + 1]) : v; }

// Sums over groups of columns that other phases left behind.
template <Matrix m>
__device__ __noinline__ void sum_groups(gemm::Operand<m> x, int n_columns) {
  constexpr int kGroups = gemm::Operand<m>::kGroups;
#pragma unroll 1
  for (int i = (threadIdx.x / 32 * kGrid + blockIdx.x) * 32 + threadIdx.x % 32; i < n_columns * kGroups; i += kGrid * kConsumers) {
    const int column = i % n_columns, group = i / n_columns;
    const u8* from = reinterpret_cast<const u8*>(x.pair(column, group * m.group));
    constexpr int kUnits = m.group / 8;
    uint4 v[kUnits];  // all on their way before the first is needed
#pragma unroll
    for (int k = 0; k < kUnits; k++) v[k] = x.get_8(reinterpret_cast<const u32*>(from + x.rows_further(k)));
    float sum = 0;
#pragma unroll
    for (int k = 0; k < kUnits; k++) sum += sum_of_8(v[k]);
    *x.sum(column, group) = sum;
  }
}

// A product that is added to the residual, with a bias if there is one; nobody else adds to it. Compiled once for W_o and
// W_down where they differ in their columns only.
template <bool kFew, Matrix m, bool kWhole>
__device__ __noinline__ void add_rows(const u8* weights, gemm::View x, const float* bias, float* residual, int n_columns) {
  gemm::multiply_rows<kFew, m, kWhole>(weights, x, n_columns, [&](int row, int column, float2 low, float2 high) {
    float* at = residual + (u64)column * model::kDim + row;
    low = biased(bias, row, low), high = biased(bias, row + 8, high);
    red_add(at, low.x), red_add(at + 1, low.y);
    red_add(at + 8, high.x), red_add(at + 9, high.y);
  });
}
template <bool kFew, Matrix m>
__device__ __forceinline__ void add_product(const u8* layer, const gemm::View& x, const float* bias, float* residual, int n_columns) {
  add_rows<kFew, m.rows_alone(), gemm::kWholeStages<kFew, m>>(layer + m.offset, x, bias, residual, n_columns);
}

template <bool kFew>
__device__ __noinline__ void multiply_qkv(const u8* layer, gemm::View x, const float* bias, float* qkv, int n_columns) {
  gemm::multiply<kFew, tensors::wqkv>(layer, x, n_columns, [&](int row, int column, float2 low, float2 high) {
    float* at = qkv + (u64)column * tensors::wqkv.rows + row;
    *reinterpret_cast<float2*>(at) = biased(bias, row, low);
    *reinterpret_cast<float2*>(at + 8) = biased(bias, row + 8, high);
  });
}

// SwiGLU's result for W_down.
using Hidden = gemm::Operand<tensors::w_down.columns_alone()>;
template <bool kFew>
__device__ __noinline__ void gate_and_up(const u8* layer, gemm::View x, const float* bias, Hidden hidden, int n_columns) {
  gemm::multiply<kFew, tensors::w_gate_up>(layer, x, n_columns, [&](int row, int column, float2 gate, float2 up) {
    gate = biased(bias, row, gate), up = biased(bias, row + 8, up);
    *hidden.pair(column, row / 16 * 8 + row % 8) = round_pair<tensors::w_down.bf16()>(silu(gate.x) * up.x, silu(gate.y) * up.y);
  });
}

// kFew: for at most gemm::kFewColumns tokens.
template <bool kFew>
__device__ void read_chunk(const StepArgs& args) {
  const PrefillWorkspace work(args);
  const gemm::Operand<tensors::wqkv.columns_alone()> attention_input{work.x(), work.x_sums()};
  const gemm::Operand<tensors::w_gate_up.columns_alone()> ffn_input{work.x(), work.x_sums()};
  const gemm::Operand<tensors::wo.columns_alone()> attended{work.attended(), work.attended_sums()};
  const Hidden hidden{work.hidden(), work.hidden_sums()};
  GridBarrier grid(args);
  const int n = args.n_columns;

  gemm::init_pipelines();
  embed(args.weights + tensors::embed.offset, kFew ? args.tokens : work.tokens(), work.residual(), n);
#pragma unroll 1
  for (int layer = 0; layer < model::kLayers; layer++) {
    const u8* weights = args.weights + tensors::kLayersOffset + layer * tensors::kLayerBytes;
    const auto vector = [&](u64 offset) { return offset == tensors::kAbsent ? nullptr : reinterpret_cast<const float*>(weights + offset); };
    u8* cache = args.kv_cache + layer * args.kv_layer_bytes;

    norm(vector(tensors::attn_norm), work.residual(), attention_input, n);
    grid.sync();  // publishes the normed residual

    multiply_qkv<kFew>(weights, attention_input.view(), vector(tensors::wqkv_bias), work.qkv(), n);
    grid.sync();  // publishes q, k and v of the chunk

    turn_heads<kFew>(args, work.qkv(), vector(tensors::q_norm), vector(tensors::k_norm), cache);
    if (layer + 1 == model::kLayers) return;
    grid.sync();  // publishes the chunk's queries, keys and values

    attend_prompt<kFew>(args, model::window(layer), work.qkv(), cache, attended);
    grid.sync();  // publishes the heads' outputs
    if constexpr (tensors::wo.has_sums()) {
      sum_groups(attended, n);
      grid.sync();  // publishes the sums of the heads' outputs
    }

    add_product<kFew, tensors::wo>(weights, attended.view(), vector(tensors::wo_bias), work.residual(), n);
    grid.sync();  // publishes the residual with attention added

    norm(vector(tensors::ffn_norm), work.residual(), ffn_input, n);
    grid.sync();  // publishes the normed residual

    gate_and_up<kFew>(weights, ffn_input.view(), vector(tensors::w_gate_up_bias), hidden, n);
    grid.sync();  // publishes SwiGLU's result
    if constexpr (tensors::w_down.has_sums()) {
      sum_groups(hidden, n);
      grid.sync();  // publishes the sums of SwiGLU's result
    }

    add_product<kFew, tensors::w_down>(weights, hidden.view(), vector(tensors::w_down_bias), work.residual(), n);
    grid.sync();  // publishes the layer's output
  }
}
}  // namespace prompt

#ifndef ONLY_PREFILL_FEW
extern "C" __global__ void __launch_bounds__(kConsumers, 1) prefill(const __grid_constant__ StepArgs args) { prompt::read_chunk<false>(args); }
#endif
#ifndef ONLY_PREFILL
extern "C" __global__ void __launch_bounds__(kConsumers, 1) prefill_few(const __grid_constant__ StepArgs args) { prompt::read_chunk<true>(args); }
#endif
