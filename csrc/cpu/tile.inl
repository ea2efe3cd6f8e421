// Blocks of rows as flat arrays, and sums in a fixed order. Included by every kernel, once per instruction set.

inline const void* element(const View& view, int64_t index) {
  return static_cast<const char*>(view.data) + index * size_of(view.dtype);
}

template <class Element, class T>
void convert_rows(const View& view, int64_t row, int64_t rows, int64_t cols, T* out) {
  const Element* base = static_cast<const Element*>(view.data) + row * view.row_stride;
  if (view.col_stride == 1 && view.row_stride == cols) {
    for (int64_t i = 0; i < rows * cols; ++i) out[i] = static_cast<T>(to_float(base[i]));
    return;
  }
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < cols; ++c) {
      out[r * cols + c] = static_cast<T>(to_float(base[r * view.row_stride + c * view.col_stride]));
    }
  }
}

// Rows [row, row + rows) as a contiguous array of T: the tensor's own memory where that is possible, else scratch.
template <class T>
const T* read_rows(const View& view, int64_t row, int64_t rows, int64_t cols, T* scratch) {
  const bool rows_follow = view.row_stride == cols || (rows == 1 && view.row_stride != 0);
  if (view.dtype == dtype_of<T>() && rows_follow && (view.col_stride == 1 || cols == 1)) {
    return static_cast<const T*>(view.data) + row * view.row_stride;
  }
  switch (view.dtype) {
    case DType::kFloat32:
      convert_rows<float>(view, row, rows, cols, scratch);
      break;
    case DType::kFloat64:
      convert_rows<double>(view, row, rows, cols, scratch);
      break;
    case DType::kBFloat16:
      convert_rows<BFloat16>(view, row, rows, cols, scratch);
      break;
    case DType::kFloat16:
      convert_rows<Float16>(view, row, rows, cols, scratch);
      break;
    case DType::kUInt8:
      convert_rows<uint8_t>(view, row, rows, cols, scratch);
      break;
  }
  return scratch;
}

// Where a kernel may write `T`s for elements [begin, ...) of an output: the output itself, or scratch for write_back.
template <class T>
T* write_target(const Output& output, int64_t begin, T* scratch) {
  return output.dtype == dtype_of<T>() ? static_cast<T*>(output.data) + begin : scratch;
}

template <class T>
void write_back(const Output& output, int64_t begin, int64_t count, const T* from) {
  switch (output.dtype) {
    case DType::kFloat32:
      if (static_cast<float*>(output.data) + begin == static_cast<const void*>(from)) return;
      for (int64_t i = 0; i < count; ++i) from_float(from[i], static_cast<float*>(output.data) + begin + i);
      break;
    case DType::kFloat64:
      if (static_cast<double*>(output.data) + begin == static_cast<const void*>(from)) return;
      for (int64_t i = 0; i < count; ++i) from_float(from[i], static_cast<double*>(output.data) + begin + i);
      break;
    case DType::kBFloat16:
      for (int64_t i = 0; i < count; ++i) from_float(from[i], static_cast<BFloat16*>(output.data) + begin + i);
      break;
    case DType::kFloat16:
      for (int64_t i = 0; i < count; ++i) from_float(from[i], static_cast<Float16*>(output.data) + begin + i);
      break;
    case DType::kUInt8:
      break;  // no output is one of bytes
  }
}

// body(i, k) for each i < count, k = i mod kLanes: a loop of whole vectors, in which sums may stand per lane.
template <class Body>
PYFAST_PPO_INLINE void for_each_lane(int64_t count, const Body& body) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    for (int k = 0; k < kLanes; ++k) body(i + k, k);
  }
  for (int k = 0; i + k < count; ++k) body(i + k, k);
}

// One sum in kLanes partial sums.
template <class T>
struct LaneSum {
  T lanes[kLanes] = {};

  void add(const LaneSum& other) {
    for (int k = 0; k < kLanes; ++k) lanes[k] += other.lanes[k];
  }

  void add(const T* x, int64_t count) {
    for_each_lane(count, [&](int64_t i, int k) { lanes[k] += x[i]; });
  }

  double total() const {
    double sum = 0.0;
    for (int k = 0; k < kLanes; ++k) sum += lanes[k];
    return sum;
  }
};

// The largest of numbers that are not negative; NaNs are passed over.
template <class T>
struct LaneMax {
  T lanes[kLanes] = {};

  double total() const {
    T largest = 0;
    for (int k = 0; k < kLanes; ++k) largest = lanes[k] > largest ? lanes[k] : largest;
    return largest;
  }
};

// out[r] = sum over c of x[r, c]
template <class T>
void sum_each_row(const T* x, int64_t rows, int64_t cols, T* out) {
  if (cols >= 4 * kLanes) {
    for (int64_t r = 0; r < rows; ++r) {
      LaneSum<T> sum;
      sum.add(x + r * cols, cols);
      out[r] = static_cast<T>(sum.total());
    }
    return;
  }
  constexpr int kRows = 8;  // as many independent chains of additions
  int64_t r = 0;
  for (; r + kRows <= rows; r += kRows) {
    T sums[kRows] = {};
    for (int64_t c = 0; c < cols; ++c) {
      for (int k = 0; k < kRows; ++k) sums[k] += x[(r + k) * cols + c];
    }
    for (int k = 0; k < kRows; ++k) out[r + k] = sums[k];
  }
  for (; r < rows; ++r) {
    T sum = 0;
    for (int64_t c = 0; c < cols; ++c) sum += x[r * cols + c];
    out[r] = sum;
  }
}

// out[r, c] = x[r]; out has room for kLanes elements more: each row is written in whole vectors, the next one
// overwrites the excess.
template <class T>
void repeat_each(const T* x, int64_t rows, int64_t cols, T* out) {
  for (int64_t r = 0; r < rows; ++r) {
    const T value = x[r];
    for (int64_t c = 0; c < cols; c += kLanes) {
      for (int k = 0; k < kLanes; ++k) out[r * cols + c + k] = value;
    }
  }
}

// out[r, c] = row[c]; row may be the first row of out.
template <class T>
void repeat_row(const T* row, int64_t cols, int64_t rows, T* out) {
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < cols; ++c) out[r * cols + c] = row[c];
  }
}

// out[c] += sum over r of x[r, c]
template <class T>
void add_columns(const T* x, int64_t rows, int64_t cols, double* out) {
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < cols; ++c) out[c] += x[r * cols + c];
  }
}
