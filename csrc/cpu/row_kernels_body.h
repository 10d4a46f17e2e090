// The body of row_kernels_<isa>.cpp, which defines before including it:
//   FE_ISA           name of the namespace, e.g. avx2
//   FE_VECTOR_BYTES  width of a vector register
//   FE_HAS_F16C      1 where the hardware converts float16
// and has switched the compiler to that instruction set. Everything below is in a namespace of its own and calls no
// inline function from outside: such a function would be emitted once per instruction set under one name, and the
// linker could keep the one that an older CPU cannot run.
//
// Vectors are GCC's and clang's own vector types: the same source for SSE2, AVX2, AVX-512 and NEON, kept in registers
// over a run of rows, which loops left to the vectoriser were not.

namespace fast_embedding::cpu::FE_ISA {
namespace {

#define FE_INLINE inline __attribute__((always_inline))

template <typename T, int kLanes>
struct VectorOf {
  typedef T type __attribute__((vector_size(kLanes * sizeof(T))));
};
template <typename T, int kLanes>
using Vec = typename VectorOf<T, kLanes>::type;

template <typename V>
FE_INLINE V load_as(const void* address) {
  V value;
  __builtin_memcpy(&value, address, sizeof(V));
  return value;
}
template <typename V>
FE_INLINE void store(void* address, V value) {
  __builtin_memcpy(address, &value, sizeof(V));
}
template <typename To, typename From>
FE_INLINE To bit_cast(From value) {
  static_assert(sizeof(To) == sizeof(From), "");
  To result;
  __builtin_memcpy(&result, &value, sizeof(To));
  return result;
}
// mask lanes are all ones or all zeros.
template <typename V>
FE_INLINE V select(V mask, V a, V b) {
  return (mask & a) | (~mask & b);
}

// ---- 16-bit floats -----------------------------------------------------------------------------------------------

template <int kLanes>
FE_INLINE Vec<float, kLanes> bfloat16_to_float(Vec<uint16_t, kLanes> bits) {
  return bit_cast<Vec<float, kLanes>>(__builtin_convertvector(bits, Vec<uint32_t, kLanes>) << 16);
}

// Round to nearest even; a NaN stays one although its payload may be all in the bits that go.
template <int kLanes>
FE_INLINE Vec<uint16_t, kLanes> float_to_bfloat16(Vec<float, kLanes> value) {
  using U = Vec<uint32_t, kLanes>;
  const U bits = bit_cast<U>(value);
  const U rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const U nan = (bits >> 16) | 0x40u;
  const U is_nan = (U)((bits & 0x7fffffffu) > 0x7f800000u);
  return __builtin_convertvector(select(is_nan, nan, rounded), Vec<uint16_t, kLanes>);
}

// After M. Dukhan's FP16 library (MIT licence): float arithmetic on shifted bits, no branches, and exact also where the
// CPU flushes denormals to zero.
template <int kLanes>
FE_INLINE Vec<float, kLanes> float16_to_float(Vec<uint16_t, kLanes> half) {
  using U = Vec<uint32_t, kLanes>;
  using F = Vec<float, kLanes>;
  const U word = __builtin_convertvector(half, U) << 16;
  const U sign = word & 0x80000000u;
  const U twice = word + word;
  const F normal = bit_cast<F>((twice >> 4) + (0xe0u << 23)) * 0x1.0p-112f;
  const F denormal = bit_cast<F>((twice >> 17) | (126u << 23)) - 0.5f;
  const U is_denormal = (U)(twice < (1u << 27));
  return bit_cast<F>(sign | select(is_denormal, bit_cast<U>(denormal), bit_cast<U>(normal)));
}

template <int kLanes>
FE_INLINE Vec<uint16_t, kLanes> float_to_float16(Vec<float, kLanes> value) {
  using U = Vec<uint32_t, kLanes>;
  using F = Vec<float, kLanes>;
  const U word = bit_cast<U>(value);
  const U twice = word + word;
  const U sign = word & 0x80000000u;
  // Adding a power of two whose unit in the last place is float16's makes the addition do the rounding.
  const F base = (bit_cast<F>(word & 0x7fffffffu) * 0x1.0p+112f) * 0x1.0p-110f;
  const U exponent = twice & 0xff000000u;
  const U bias = select((U)(exponent < 0x71000000u), U{} + 0x71000000u, exponent);
  const U sum = bit_cast<U>(bit_cast<F>((bias >> 1) + 0x07800000u) + base);
  const U finite = ((sum >> 13) & 0x7c00u) + (sum & 0xfffu);
  const U result = (sign >> 16) | select((U)(twice > 0xff000000u), U{} + 0x7e00u, finite);
  return __builtin_convertvector(result, Vec<uint16_t, kLanes>);
}

#if FE_HAS_F16C
template <>
FE_INLINE Vec<float, 8> float16_to_float<8>(Vec<uint16_t, 8> half) {
  return bit_cast<Vec<float, 8>>(_mm256_cvtph_ps(bit_cast<__m128i>(half)));
}
template <>
FE_INLINE Vec<uint16_t, 8> float_to_float16<8>(Vec<float, 8> value) {
  return bit_cast<Vec<uint16_t, 8>>(_mm256_cvtps_ph(bit_cast<__m256>(value), _MM_FROUND_TO_NEAREST_INT));
}
#if FE_VECTOR_BYTES == 64  // maskz: g++ 12 warns of its own header's undefined operand in the plain form
template <>
FE_INLINE Vec<float, 16> float16_to_float<16>(Vec<uint16_t, 16> half) {
  return bit_cast<Vec<float, 16>>(_mm512_maskz_cvtph_ps(0xffff, bit_cast<__m256i>(half)));
}
template <>
FE_INLINE Vec<uint16_t, 16> float_to_float16<16>(Vec<float, 16> value) {
  return bit_cast<Vec<uint16_t, 16>>(_mm512_maskz_cvtps_ph(0xffff, bit_cast<__m512>(value), _MM_FROUND_TO_NEAREST_INT));
}
#endif
#endif

// ---- Vectors of accumulators -------------------------------------------------------------------------------------

template <typename acc_t>
constexpr int kLanesOf = FE_VECTOR_BYTES / sizeof(acc_t);

template <int kLanes>
FE_INLINE Vec<float, kLanes> widen(const float* source) {
  return load_as<Vec<float, kLanes>>(source);
}
template <int kLanes>
FE_INLINE Vec<double, kLanes> widen(const double* source) {
  return load_as<Vec<double, kLanes>>(source);
}
template <int kLanes>
FE_INLINE Vec<float, kLanes> widen(const BFloat16* source) {
  return bfloat16_to_float<kLanes>(load_as<Vec<uint16_t, kLanes>>(source));
}
template <int kLanes>
FE_INLINE Vec<float, kLanes> widen(const Float16* source) {
  return float16_to_float<kLanes>(load_as<Vec<uint16_t, kLanes>>(source));
}

template <int kLanes>
FE_INLINE void narrow(float* target, Vec<float, kLanes> value) {
  store(target, value);
}
template <int kLanes>
FE_INLINE void narrow(double* target, Vec<double, kLanes> value) {
  store(target, value);
}
template <int kLanes>
FE_INLINE void narrow(BFloat16* target, Vec<float, kLanes> value) {
  store(target, float_to_bfloat16<kLanes>(value));
}
template <int kLanes>
FE_INLINE void narrow(Float16* target, Vec<float, kLanes> value) {
  store(target, float_to_float16<kLanes>(value));
}

template <int kValue>
struct Count {
  static constexpr int value = kValue;
};

// body(Lanes<n>, column) over the columns [column, dim): full vectors first, then one vector each of half the width, a
// quarter, ... With a constant dim this is straight-line code.
template <int kLanes, typename Body>
FE_INLINE void for_each_tail(int64_t column, int64_t dim, const Body& body) {
  if constexpr (kLanes > 0) {
    if (dim & kLanes) {
      body(Count<kLanes>{}, column);
      column += kLanes;
    }
    for_each_tail<kLanes / 2>(column, dim, body);
  }
}
template <int kLanes, typename Body>
FE_INLINE void for_each_vector(int64_t column, int64_t dim, const Body& body) {
  for (; column + kLanes <= dim; column += kLanes) body(Count<kLanes>{}, column);
  for_each_tail<kLanes / 2>(column, dim, body);
}

template <typename scalar_t>
FE_INLINE void add_row(accumulator_t<scalar_t>* acc, const scalar_t* grad, int64_t dim) {
  using acc_t = accumulator_t<scalar_t>;
  constexpr int kFull = kLanesOf<acc_t>;
  // Loads of four vectors before their stores: a load behind a store to an address alike in its low 12 bits waits for
  // it, which made the plain loop half as fast.
  constexpr int kUnroll = 4;
  int64_t column = 0;
  for (; column + kUnroll * kFull <= dim; column += kUnroll * kFull) {
    Vec<acc_t, kFull> sums[kUnroll];
    for (int u = 0; u < kUnroll; ++u) {
      const int64_t place = column + u * kFull;
      sums[u] = load_as<Vec<acc_t, kFull>>(acc + place) + widen<kFull>(grad + place);
    }
    for (int u = 0; u < kUnroll; ++u) store(acc + column + u * kFull, sums[u]);
  }
  for_each_vector<kFull>(column, dim, [&](auto lanes, int64_t column) __attribute__((always_inline)) {
    constexpr int kLanes = decltype(lanes)::value;
    store(acc + column, load_as<Vec<acc_t, kLanes>>(acc + column) + widen<kLanes>(grad + column));
  });
}

FE_INLINE void prefetch(const void* address, int64_t bytes) {
  for (int64_t offset = 0; offset < bytes; offset += 64) __builtin_prefetch(static_cast<const char*>(address) + offset);
}

// ---- Kernels: kDim is the row's width where it is known to the compiler, else 0 ------------------------------------

template <typename scalar_t, int kDim>
void accumulate(accumulator_t<scalar_t>* acc, int64_t copies, int64_t copy_stride, const int64_t* rows, int64_t count,
                const scalar_t* grad, int64_t grad_stride, int64_t dim, int64_t padding_idx) {
  if constexpr (kDim > 0) dim = kDim;
  for (int64_t i = 0; i < count; ++i, grad += grad_stride) {
    if (rows[i] == padding_idx) continue;
    add_row(acc + (i & (copies - 1)) * copy_stride + rows[i] * dim, grad, dim);
  }
}

// The hardware follows a row once it is being read; what it cannot guess is where the next one starts.
constexpr int64_t kPrefetchBytes = 256;

template <typename scalar_t, int kDim>
void sum_rows(accumulator_t<scalar_t>* sum, const scalar_t* grad, int64_t grad_stride, const uint64_t* keys,
              int64_t count, uint64_t position_mask, int64_t dim) {
  using acc_t = accumulator_t<scalar_t>;
  constexpr int kLanes = kLanesOf<acc_t>;
  if constexpr (kDim > 0) dim = kDim;
  const int64_t row_bytes = dim * static_cast<int64_t>(sizeof(scalar_t));
  const int64_t prefetch_bytes = row_bytes < kPrefetchBytes ? row_bytes : kPrefetchBytes;
  const auto row = [&](int64_t i) __attribute__((always_inline)) {
    return grad + static_cast<int64_t>(keys[i] & position_mask) * grad_stride;
  };
  const auto prefetch_row = [&](int64_t i) __attribute__((always_inline)) { prefetch(row(i), prefetch_bytes); };
  if constexpr (kDim >= kLanes && kDim % kLanes == 0 && kDim <= 8 * kLanes) {
    // The sum of the run stays in registers.
    constexpr int kVectors = kDim / kLanes;
    Vec<acc_t, kLanes> total[kVectors];
    prefetch_row(kPrefetchRows);
    for (int v = 0; v < kVectors; ++v) total[v] = widen<kLanes>(row(0) + v * kLanes);
    for (int64_t i = 1; i < count; ++i) {
      prefetch_row(i + kPrefetchRows);
      for (int v = 0; v < kVectors; ++v) total[v] += widen<kLanes>(row(i) + v * kLanes);
    }
    for (int v = 0; v < kVectors; ++v) store(sum + v * kLanes, total[v]);
  } else {
    prefetch_row(kPrefetchRows);
    for_each_vector<kLanes>(0, dim, [&](auto lanes, int64_t column) __attribute__((always_inline)) {
      constexpr int kWidth = decltype(lanes)::value;
      store(sum + column, widen<kWidth>(row(0) + column));
    });
    // Four rows at a time, one after the other: the sum is loaded and stored once, and memory follows four streams.
    // Where the rows are neighbours they are one stream, which four readers at once would break up.
    int64_t i = 1;
    for (; i + 4 <= count; i += 4) {
      if (row(i + 3) - row(i - 1) == 4 * dim) {
        for (int64_t next = 0; next < 4; ++next) add_row(sum, row(i + next), dim);
        continue;
      }
      for (int64_t ahead = 0; ahead < 4; ++ahead) prefetch_row(i + ahead + kPrefetchRows - 3);
      for_each_vector<kLanes>(0, dim, [&](auto lanes, int64_t column) __attribute__((always_inline)) {
        constexpr int kWidth = decltype(lanes)::value;
        auto total = load_as<Vec<acc_t, kWidth>>(sum + column);
        for (int64_t next = 0; next < 4; ++next) total += widen<kWidth>(row(i + next) + column);
        store(sum + column, total);
      });
    }
    for (; i < count; ++i) {
      prefetch_row(i + kPrefetchRows);
      add_row(sum, row(i), dim);
    }
  }
}

template <typename scalar_t, int kDim>
void sum_terms(scalar_t* output, int64_t output_stride, const scalar_t* source, const int64_t* starts, int64_t terms,
               int64_t count, int64_t dim, int64_t prefetch_bytes) {
  using acc_t = accumulator_t<scalar_t>;
  if constexpr (kDim > 0) dim = kDim;
  // A vector's sums stay in registers and are stored once. Each is a chain of additions: a row of a few columns has no
  // second one to fill its waits, so four rows go together.
  const auto sum_of = [&](auto rows) __attribute__((always_inline)) {
    constexpr int kRows = decltype(rows)::value;
    if (prefetch_bytes > 0) {
      for (int64_t i = 0; i < kRows * terms; ++i) prefetch(source + starts[i + kPrefetchRows], prefetch_bytes);
    }
    for_each_vector<kLanesOf<acc_t>>(0, dim, [&](auto lanes, int64_t column) __attribute__((always_inline)) {
      constexpr int kLanes = decltype(lanes)::value;
      Vec<acc_t, kLanes> total[kRows];
      for (int row = 0; row < kRows; ++row) total[row] = widen<kLanes>(source + starts[row * terms] + column);
      for (int64_t term = 1; term < terms; ++term) {
        for (int row = 0; row < kRows; ++row) {
          total[row] += widen<kLanes>(source + starts[row * terms + term] + column);
        }
      }
      for (int row = 0; row < kRows; ++row) narrow<kLanes>(output + row * output_stride + column, total[row]);
    });
    starts += kRows * terms;
    output += kRows * output_stride;
  };
  int64_t i = 0;
  if (dim <= kLanesOf<acc_t>) {
    for (; i + 4 <= count; i += 4) sum_of(Count<4>{});
  }
  for (; i < count; ++i) sum_of(Count<1>{});
}

template <typename scalar_t>
void combine(scalar_t* output, const accumulator_t<scalar_t>* first, const accumulator_t<scalar_t>* rest,
             int64_t stride, int64_t count, int64_t dim) {
  using acc_t = accumulator_t<scalar_t>;
  for_each_vector<kLanesOf<acc_t>>(0, dim, [&](auto lanes, int64_t column) __attribute__((always_inline)) {
    constexpr int kLanes = decltype(lanes)::value;
    auto total = load_as<Vec<acc_t, kLanes>>(first + column);
    for (int64_t i = 0; i < count; ++i) total += load_as<Vec<acc_t, kLanes>>(rest + i * stride + column);
    narrow<kLanes>(output + column, total);
  });
}

template <typename index_t>
bool in_range(const index_t* indices, int64_t stride, int64_t count, int64_t num_embeddings) {
  // The sign of index or of V - 1 - index is set where one is out of range. Sums of signs vectorise on every CPU;
  // 64-bit comparisons do not. memcpy because an index may stand at any address of a foreign buffer.
  const uint64_t last = static_cast<uint64_t>(num_embeddings) - 1;
  uint64_t signs = 0;
  const auto look = [&](int64_t i) __attribute__((always_inline)) {
    index_t index;
    __builtin_memcpy(&index, indices + i, sizeof(index));
    signs |= static_cast<uint64_t>(static_cast<int64_t>(index)) |
             (last - static_cast<uint64_t>(static_cast<int64_t>(index)));
  };
  if (stride == 1) {  // a stride known to the compiler makes this loop vectorise
    for (int64_t i = 0; i < count; ++i) look(i);
  } else {
    for (int64_t i = 0; i < count; ++i) look(i * stride);
  }
  return static_cast<int64_t>(signs) >= 0;
}

// Copies kBytes, or where kBytes is 0 a vector at a time, the last of them ending with the row and overlapping the one
// before: rows of any width without a loop over what is left.
template <int kBytes>
FE_INLINE void copy_row(char* output, const char* source, int64_t bytes) {
  if constexpr (kBytes > 0) {
    __builtin_memcpy(output, source, kBytes);
  } else {
    using V = Vec<char, FE_VECTOR_BYTES>;
    for (int64_t offset = 0; offset + FE_VECTOR_BYTES < bytes; offset += FE_VECTOR_BYTES) {
      store(output + offset, load_as<V>(source + offset));
    }
    store(output + bytes - FE_VECTOR_BYTES, load_as<V>(source + bytes - FE_VECTOR_BYTES));
  }
}

template <typename Copy>
FE_INLINE void gather_by(const Copy& copy, void* output, int64_t output_stride, const void* source,
                         int64_t source_stride, const int64_t* rows, int64_t count, int64_t prefetch_bytes) {
  char* target = static_cast<char*>(output);
  const char* table = static_cast<const char*>(source);
  if (prefetch_bytes == 0) {
    for (int64_t i = 0; i < count; ++i, target += output_stride) copy(target, table + rows[i] * source_stride);
    return;
  }
  for (int64_t i = 0; i < count; ++i, target += output_stride) {
    if (i + kPrefetchRows < count) prefetch(table + rows[i + kPrefetchRows] * source_stride, prefetch_bytes);
    copy(target, table + rows[i] * source_stride);
  }
}

// Rows of kBytes, or of FE_VECTOR_BYTES and more where kBytes is 0.
template <int kBytes>
void gather(void* output, int64_t output_stride, const void* source, int64_t source_stride, const int64_t* rows,
            int64_t count, int64_t row_bytes, int64_t prefetch_bytes) {
  const auto copy = [&](char* to, const char* from)
                        __attribute__((always_inline)) { copy_row<kBytes>(to, from, row_bytes); };
  gather_by(copy, output, output_stride, source, source_stride, rows, count, prefetch_bytes);
}

// Long rows: the C library's copy aligns its stores, for which shorter ones do not pay (2 KB: 1.3 times slower).
constexpr int64_t kLongRowBytes = 3 << 10;
void gather_long(void* output, int64_t output_stride, const void* source, int64_t source_stride, const int64_t* rows,
                 int64_t count, int64_t row_bytes, int64_t prefetch_bytes) {
  const auto copy = [&](char* to, const char* from) __attribute__((always_inline)) {
    __builtin_memcpy(to, from, static_cast<uint64_t>(row_bytes));
  };
  gather_by(copy, output, output_stride, source, source_stride, rows, count, prefetch_bytes);
}

// Rows of kBytes to twice as many: the first kBytes and the last.
template <int kBytes>
void gather_between(void* output, int64_t output_stride, const void* source, int64_t source_stride, const int64_t* rows,
                    int64_t count, int64_t row_bytes, int64_t prefetch_bytes) {
  const auto copy = [&](char* to, const char* from) __attribute__((always_inline)) {
    const auto last = load_as<Vec<char, kBytes>>(from + row_bytes - kBytes);
    store(to, load_as<Vec<char, kBytes>>(from));
    store(to + row_bytes - kBytes, last);
  };
  gather_by(copy, output, output_stride, source, source_stride, rows, count, prefetch_bytes);
}

template <typename scalar_t, int kDim>
constexpr GradKernels<scalar_t> kGradKernels = {accumulate<scalar_t, kDim>, sum_rows<scalar_t, kDim>,
                                                sum_terms<scalar_t, kDim>, combine<scalar_t>};

// The widths of small tables get code of their own; beyond, a row is long enough to hide its loop.
template <typename scalar_t>
GradKernels<scalar_t> grad_kernels_for(int64_t dim) {
  switch (dim) {
    case 1:
      return kGradKernels<scalar_t, 1>;
    case 2:
      return kGradKernels<scalar_t, 2>;
    case 4:
      return kGradKernels<scalar_t, 4>;
    case 8:
      return kGradKernels<scalar_t, 8>;
    case 12:
      return kGradKernels<scalar_t, 12>;
    case 16:
      return kGradKernels<scalar_t, 16>;
    case 24:
      return kGradKernels<scalar_t, 24>;
    case 32:
      return kGradKernels<scalar_t, 32>;
    case 64:
      return kGradKernels<scalar_t, 64>;
    case 128:
      return kGradKernels<scalar_t, 128>;
    default:
      return kGradKernels<scalar_t, 0>;
  }
}

GatherFn gather_for(int64_t row_bytes) {
  switch (row_bytes) {
    case 2:
      return gather<2>;
    case 4:
      return gather<4>;
    case 8:
      return gather<8>;
    case 16:
      return gather<16>;
    case 32:
      return gather<32>;
    case 64:
      return gather<64>;
    case 128:
      return gather<128>;
    case 256:
      return gather<256>;
    default:
      break;
  }
  if (row_bytes < 4) return gather_between<2>;
  if (row_bytes < 8) return gather_between<4>;
  if (row_bytes < 16) return gather_between<8>;
  if (row_bytes < 32) return gather_between<16>;
  if constexpr (FE_VECTOR_BYTES == 64) {
    if (row_bytes < 64) return gather_between<32>;
  }
  return row_bytes < kLongRowBytes ? gather<0> : gather_long;
}

constexpr RowKernels kRowKernels = {in_range<int32_t>,         in_range<int64_t>,        gather_for,
                                    grad_kernels_for<float>,   grad_kernels_for<double>, grad_kernels_for<Float16>,
                                    grad_kernels_for<BFloat16>};

#undef FE_INLINE

}  // namespace
}  // namespace fast_embedding::cpu::FE_ISA
