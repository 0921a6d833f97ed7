#include "onepass/attention.h"

namespace onepass {

const char* cache_fault(const Cache& c, int64_t batch, int64_t queries, int64_t tokens, const Rotary& rotary) {
  if (c.cu_seqlens && (c.cu_seqlens[0] != 0 || c.cu_seqlens[batch] != tokens)) return "cu_seqlens_q";
  const int64_t capacity = c.slots * (c.block_table ? c.blocks : 1);
  for (int64_t b = 0; b < batch; ++b) {
    const int64_t count = c.cu_seqlens ? int64_t{c.cu_seqlens[b + 1]} - c.cu_seqlens[b] : queries;
    if (count < 0 || count > queries) return "cu_seqlens_q";
    const int64_t length = c.seqlens ? c.seqlens[b] : c.keys, added = c.appended < 0 ? count : c.appended;
    const int64_t total = length + added;
    if (length < 0 || total > capacity) return "cache_seqlens";
    const int64_t turned = added > count ? added : count;  // keys or queries, from `length` on
    if (rotary.cos && turned && length + turned > rotary.positions) return "cache_seqlens (beyond rotary_cos)";
    if (c.leftpad && (c.leftpad[b] < 0 || c.leftpad[b] > total)) return "cache_leftpad";
    if (c.batch_idx && (c.batch_idx[b] < 0 || c.batch_idx[b] >= c.pages)) return "cache_batch_idx";
    if (c.block_table)
      for (int64_t i = 0; i * c.slots < total; ++i) {
        const int64_t page = c.block_table[b * c.blocks + i];
        if (page < 0 || page >= c.pages) return "block_table";
      }
  }
  return nullptr;
}

}  // namespace onepass
