// Rows of a batch as they lie in memory.
#pragma once
#include <cstdint>

namespace onepass {

// [rows, length] with unit stride inside a row and `step` elements from one row to the next; null: not there.
struct RowsIn {
  const void* data;
  int64_t step;
};

struct RowsOut {
  void* data;
  int64_t step;
};

}  // namespace onepass
