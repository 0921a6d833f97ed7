// out = softmax(q k^T) v over plain keys or a cache, contiguous or paged; and the append to a cache.
#pragma once
#include "onepass/cuda.h"
#include "onepass/dtype.h"
#include "onepass/isa.h"

namespace onepass {

// Element (b, i, h, 0) lies at data + b * batch + i * step + h * head, in elements; the last dim has unit stride.
struct Heads {
  const void* data;
  int64_t batch, step, head;
};

enum class MaskKind : int { none = 0, boolean = 1, additive = 2 };

// Element (b, h, i, j) at data + b * batch + h * head + i * row + j * key, bytes (boolean) or float32 (additive).
struct ScoreMask {
  MaskKind kind;
  const void* data;
  int64_t batch, head, row, key;
};

// Of a cache of codes. The scale of head h: data + b * batch + h * head; per token: data + page * batch + slot * step +
// h * head, with a cache row for the page where there are none. data null: 1.
struct Scales {
  float* data;
  int64_t batch, step, head;
  bool per_token;
};

// Turns pairs of the first 2 * half channels; cos and sin are float32 [positions, half], null: no rotation.
struct Rotary {
  const float *cos, *sin;
  int64_t positions, half;
  bool interleaved;
};

// Where the keys of a row are. A page, or without block_table a cache row, has `slots` keys and is one step of `batch`
// in Heads; there are `pages` of them.
struct Cache {
  const int32_t* seqlens;  // [B] keys before the append; null: every row has `keys`
  int64_t keys, appended;  // appended: keys since; -1 for as many as the row has queries
  int64_t slots, pages;
  const int32_t* block_table;  // [B, blocks]
  int64_t blocks;
  const int32_t *batch_idx, *leftpad, *cu_seqlens;  // [B], [B], [B + 1]; each may be null
};

struct Attention {
  int64_t batch, heads, kv_heads, head_dim, value_dim;
  int64_t queries;  // of a row; the longest row of a ragged batch
  int64_t tokens;   // rows of q over all
  DType dtype;
  Heads q, k, v, out;  // ragged q and out: token t at t * step
  float* lse;          // [B, H, queries], or [H, tokens] when ragged
  Cache cache;
  Rotary rotary;
  bool rotary_ordered;                // query i turns by cache_seqlens + i, else by cache_seqlens
  int64_t window_left, window_right;  // -1: no bound; causal comes as window_right 0
  float softcap, scale;               // softcap 0: none
  const float* slopes;                // [B or 1, H]
  int64_t slopes_batch;               // H or 0
  const float* sinks;                 // [H]
  ScoreMask mask;
  const uint8_t* tree;  // [B, queries, queries] over a row's last keys
  int num_threads;
  Codes codes = Codes::none;  // of k and v
  Scales k_scale = {}, v_scale = {};
};

// The gradient of a forward call whose out and lse are there. Contiguous keys: no pages, no batch_idx.
struct AttentionBackward {
  Attention forward;
  Heads grad_out;
  const float* grad_lse;  // as lse, may be null
  Heads dq, dk, dv;       // dq is float32 and comes in as zeros; dk and dv as k and v
  // As lse, written: the probability of a score is e^(score - top) / excess; delta = sum_d grad_out out - grad_lse.
  float *top, *excess, *delta;
};

struct Append {
  int64_t batch, kv_heads, head_dim, value_dim, tokens, steps;  // steps: new keys of a row when not ragged
  DType dtype;
  Heads k, v;              // new ones; ragged: token t at t * step
  Heads k_cache, v_cache;  // written
  Cache cache;
  Rotary rotary;
  int num_threads;
  Codes codes = Codes::none;          // of the caches
  Scales k_scale = {}, v_scale = {};  // per token: written
};

struct AttentionKernels {
  int64_t (*workspace)(const Attention&);  // bytes of scratch, 64-byte aligned
  void (*forward)(const Attention&, void* workspace);
};

struct AttentionBackwardKernels {
  int64_t (*workspace)(const Attention&);
  void (*backward)(const AttentionBackward&, void* workspace);
};

struct KvcacheKernels {
  void (*append)(const Append&);
};

ONEPASS_KERNELS(AttentionKernels, attention)
ONEPASS_KERNELS(AttentionBackwardKernels, attention_backward)
ONEPASS_KERNELS(KvcacheKernels, kvcache)

// On a device lengths, pages and offsets are not read by the host: what points outside the cache is not read or written
// by the kernels, and the workspace is sized by the capacity.
namespace cuda {
int64_t attention_workspace(const Attention&);
void attention_forward(const Attention&, void* workspace, const Stream&);
void kvcache_append(const Append&, const Stream&);
}  // namespace cuda

// What points outside the cache, or null. `queries` is the longest row, `tokens` the rows of q when ragged.
const char* cache_fault(const Cache&, int64_t batch, int64_t queries, int64_t tokens, const Rotary&);

}  // namespace onepass
