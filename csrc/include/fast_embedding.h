/* fast_embedding.h: the contract between the binding and the kernels.
 *
 * Two libraries implement it, and neither knows torch: libfast_embedding_cpu.so (fe_cpu_*, fe_plan_*) and
 * libfast_embedding_cuda.so (fe_cuda_*, fe_plan_*). Everything is plain C; a caller needs this header alone.
 *
 * Terms. A lookup reads `num_rows` x `num_tables` indices. Table t has V = num_embeddings rows of D = embedding_dim
 * columns. One table is nn.Embedding. Several are combined, see FeCombination: C is the number of the output's columns.
 *
 * Sizes, strides and offsets are int64_t and count elements, not bytes, unless the name says bytes. Strides may be 0.
 * The innermost dimension of weight, grad_output, output and grad_weight is contiguous (stride 1).
 * Pointers need the alignment of their element type only; kernels use wider accesses where the addresses allow it.
 * `tables` is host memory and is read before the call returns. All other pointers are memory of the device.
 *
 * Out of range. An index outside [0, V) is never used as an address. CPU: FE_INDEX_OUT_OF_RANGE, *index_error says
 * which, and nothing has been written. CUDA: a device-side assert after a printed line with index and table size.
 *
 * Errors. Functions return an FeStatus and never throw. fe_cuda_last_error() has the text behind FE_CUDA_ERROR.
 */
#ifndef FAST_EMBEDDING_H_
#define FAST_EMBEDDING_H_

#include <stddef.h>
#include <stdint.h>

#if defined(__GNUC__)
#define FE_EXPORT __attribute__((visibility("default")))
#else
#define FE_EXPORT
#endif

#ifdef __cplusplus
extern "C" {
#endif

/* Raised whenever a struct or a meaning changes; the binding refuses a library of another version. */
#define FE_ABI_VERSION 5

typedef enum FeStatus {
  FE_OK = 0,
  FE_INVALID_ARGUMENT = 1,    /* a null pointer, a negative size, an unknown type */
  FE_UNSUPPORTED = 2,         /* valid, but larger than the kernels take (see FePlan); the caller falls back */
  FE_WORKSPACE_TOO_SMALL = 3, /* *workspace_bytes was below the size query's answer */
  FE_INDEX_OUT_OF_RANGE = 4,  /* CPU only */
  FE_CUDA_ERROR = 5
} FeStatus;

typedef enum FeScalarType { FE_FLOAT32 = 0, FE_FLOAT64 = 1, FE_FLOAT16 = 2, FE_BFLOAT16 = 3 } FeScalarType;
typedef enum FeIndexType { FE_INT32 = 0, FE_INT64 = 1 } FeIndexType;

typedef enum FeCombination {
  /* output[b] = [table_0[x[b, 0]], table_1[x[b, 1]], ...]; C is the sum of D. Table t's slice of the output, and of its
   * gradient, starts at column D_0 + ... + D_{t-1} */
  FE_CONCAT = 0,
  /* output[b] = table_0[x[b, 0]] + table_1[x[b, 1]] + ..., in this order, in float32 (float64 for float64), rounded
   * once. All D are equal, to C. The gradient of the output is every table's */
  FE_SUM = 1
} FeCombination;

typedef struct FeTable {
  int64_t num_embeddings; /* V >= 0 */
  int64_t embedding_dim;  /* D >= 0 */
  int64_t weight_offset;  /* where row 0 stands in weight (forward) and grad_weight (backward) */
  int64_t weight_stride;  /* from a row to the next; D where packed. The backward requires D */
  int64_t padding_idx;    /* this row gets no gradient; -1 for none. The forward ignores it */
} FeTable;

typedef struct FeForwardArgs {
  FeScalarType scalar_type;
  FeIndexType index_type;
  int64_t num_tables;
  const FeTable* tables; /* [num_tables] */
  int64_t num_rows;
  const void* indices; /* index of row b, table t at b * index_row_stride + t * index_table_stride */
  int64_t index_row_stride;
  int64_t index_table_stride;
  const void* weight;
  void* output;          /* [num_rows, C], every element written */
  int64_t output_stride; /* from a row to the next, >= C */
  FeCombination combination;
} FeForwardArgs;

typedef struct FeBackwardArgs {
  FeScalarType scalar_type; /* of grad_output and grad_weight; 16-bit types accumulate in float32 and round once */
  FeIndexType index_type;
  int64_t num_tables;
  const FeTable* tables; /* [num_tables]; their ranges in grad_weight do not overlap */
  int64_t num_rows;
  const void* indices; /* as in FeForwardArgs */
  int64_t index_row_stride;
  int64_t index_table_stride;
  const void* grad_output;    /* [num_rows, C] */
  int64_t grad_output_stride; /* from a row to the next; 0 for an expanded gradient */
  void*
      grad_weight; /* [grad_weight_numel], every element written, holes between tables with zero: need not be zeroed */
  int64_t grad_weight_numel;
  int32_t deterministic;      /* nonzero: the same bits in every run on one kind of device, at every thread count */
  int32_t scale_grad_by_freq; /* nonzero: a row's sum is divided by how many indices of its table name the row */
  FeCombination combination;
} FeBackwardArgs;

/* The sparse gradient of one table holds the rows that are looked up, and none else. How many there are depends on the
 * indices, so it takes two calls, between which the caller reads *count and allocates rows and values:
 *
 *   *_sparse_count     writes *count (of the device, as all pointers but `tables`), and what the second call needs into
 *                      the workspace: at most min(num_rows, V)
 *   *_sparse_backward  writes rows [count], ascending, and their sums to args->grad_weight [count, D], packed; with
 *                      count == 0 nothing
 *
 * `args` are those of the dense backward, num_tables = 1, the same in both calls but for grad_weight (NULL in the
 * first), grad_weight_numel (count * D) and the table's weight_offset, all of which the first call ignores. The
 * workspace's size is asked of *_sparse_count; both calls get the same memory, untouched in between. The result is the
 * same in every run, whatever args->deterministic says. */

/* Workspace. Called with workspace == NULL a function only stores the bytes it needs in *workspace_bytes (>= 0).
 * Called with memory it uses at most *workspace_bytes of it, aligned to 256 bytes, with any content. The size depends
 * on sizes, types, flags, how far pointers and strides are aligned, and the device alone, never on the indices: the
 * query and the call get the same arguments. Where it is 0 (always, for the CUDA forward of a
 * concatenation) any address but NULL will do, and no query is owed. */

/* ---- CPU ---------------------------------------------------------------------------------------------------- */

typedef struct FeIndexError {
  int64_t index; /* the value found */
  int64_t row;   /* b */
  int64_t table; /* t */
  int64_t num_embeddings;
} FeIndexError;

/* Runs task(begin, end, closure) over disjoint ranges that cover [begin, end), concurrently where it can, each of at
 * least grain_size elements but the last, and returns when all are done. */
typedef void (*FeTask)(int64_t begin, int64_t end, void* closure);
typedef struct FeCpuContext {
  void (*parallel_for)(int64_t begin, int64_t end, int64_t grain_size, FeTask task, void* closure);
  int32_t num_threads;       /* what parallel_for uses at most; results never depend on it if deterministic */
  FeIndexError* index_error; /* written with FE_INDEX_OUT_OF_RANGE */
} FeCpuContext;

FE_EXPORT int32_t fe_cpu_abi_version(void);
FE_EXPORT FeStatus fe_cpu_embedding_forward(const FeForwardArgs* args, void* workspace, size_t* workspace_bytes,
                                            const FeCpuContext* context);
FE_EXPORT FeStatus fe_cpu_embedding_backward(const FeBackwardArgs* args, void* workspace, size_t* workspace_bytes,
                                             const FeCpuContext* context);
FE_EXPORT FeStatus fe_cpu_embedding_sparse_count(const FeBackwardArgs* args, int64_t* count, void* workspace,
                                                 size_t* workspace_bytes, const FeCpuContext* context);
FE_EXPORT FeStatus fe_cpu_embedding_sparse_backward(const FeBackwardArgs* args, int64_t count, int64_t* rows,
                                                    void* workspace, size_t* workspace_bytes,
                                                    const FeCpuContext* context);

/* ---- CUDA: enqueues on `stream` (a cudaStream_t) of the current device; never allocates, never synchronises ---- */

FE_EXPORT int32_t fe_cuda_abi_version(void);
/* CUDA version the library was compiled with, as CUDART_VERSION (13000), and of the runtime in the process. */
FE_EXPORT int32_t fe_cuda_compiled_version(void);
FE_EXPORT int32_t fe_cuda_runtime_version(void);
/* The architectures in the library, e.g. "sm_75 sm_90 compute_120". */
FE_EXPORT const char* fe_cuda_architectures(void);
/* Text of the last FE_CUDA_ERROR of this thread. */
FE_EXPORT const char* fe_cuda_last_error(void);
FE_EXPORT FeStatus fe_cuda_embedding_forward(const FeForwardArgs* args, void* workspace, size_t* workspace_bytes,
                                             void* stream);
FE_EXPORT FeStatus fe_cuda_embedding_backward(const FeBackwardArgs* args, void* workspace, size_t* workspace_bytes,
                                              void* stream);

/* ---- The plan: which CUDA kernels run the backward. Pure; both libraries export it. ----------------------------- */

typedef enum FeStrategy {
  FE_STRATEGY_OWN = 0,     /* a block owns rows and picks their indices from all: few indices. Deterministic */
  FE_STRATEGY_PRIVATE = 1, /* sums in shared memory or registers, added in order: small tables. Deterministic */
  FE_STRATEGY_TILE = 2,    /* blocks group a tile of indices and add each run with one atomic. Not deterministic */
  FE_STRATEGY_SORT = 3     /* global sort, then every row is written once. Deterministic */
} FeStrategy;

typedef struct FeDevice {
  int32_t compute_capability; /* 90 for sm_90 */
  int32_t num_sms;
  int64_t l2_bytes;
  int64_t shared_bytes_per_block; /* opt-in maximum */
  int64_t shared_bytes_per_sm;
  int32_t max_cluster_blocks; /* of a thread block cluster that sorts; 0 where none can */
} FeDevice;

typedef struct FePlanQuery {
  FeScalarType scalar_type;
  int64_t num_tables;
  int64_t num_embeddings; /* V, of all tables together */
  int64_t embedding_dim;  /* D, of all tables together */
  int64_t num_indices;    /* N, of one table */
  int64_t grad_weight_numel;
  int32_t deterministic;
  FeDevice device;
  int32_t scale_grad_by_freq; /* OWN or SORT: what knows how long a run is */
  int32_t sparse;             /* SORT */
} FePlanQuery;

/* Rows of one table, at the most, whose sums PRIVATE keeps in registers. */
#define FE_MAX_FEW_ROWS 16

typedef struct FePlan {
  FeStrategy strategy;
  int32_t tile; /* TILE: indices that a block takes at a time; 0: as many as suit the launch. SORT: rows and lookups
                   that a block writes and reads */
  int32_t digit_bits;      /* SORT: bits of the row that a pass sorts by, at the most */
  int32_t sort_tile;       /* SORT: indices a block ranks at a time, at the most */
  int32_t threads;         /* PRIVATE: threads a block, each with one column of one copy of the table; 0 for a sum, and
                              for one table of up to FE_MAX_FEW_ROWS rows whose sums are kept in registers. TILE: 256, so
                              that blocks share an SM, or 768, for one that has it to itself; 0: as suits the launch */
  int32_t splits;          /* PRIVATE: blocks that share the rows; each leaves one copy of the table to be summed */
  int32_t float32_scratch; /* TILE: a 16-bit gradient is summed in a float32 copy of grad_weight */
  int32_t cluster;         /* SORT: blocks of the cluster that sorts a table while others write zeros; 0: all sort */
} FePlan;

/* FE_UNSUPPORTED where no kernel takes the sizes (2^31 indices or rows and more). */
FE_EXPORT FeStatus fe_plan_embedding_backward(const FePlanQuery* query, FePlan* plan);

/* Of a call of several tables: those that share one launch of PRIVATE by *plan, chosen[t] != 0. The others are planned
 * by fe_plan_embedding_backward as if they were alone. plan->strategy is PRIVATE even if no table is chosen. */
FE_EXPORT FeStatus fe_plan_private_tables(const FeBackwardArgs* args, const FeDevice* device, uint8_t* chosen,
                                          FePlan* plan);

/* fe_cuda_embedding_backward by a given plan instead of the table's: for tests and for tuning. FE_INVALID_ARGUMENT
 * where the plan does not fit the arguments. */
FE_EXPORT FeStatus fe_cuda_embedding_backward_by(const FePlan* plan, const FeBackwardArgs* args, void* workspace,
                                                 size_t* workspace_bytes, void* stream);

/* `plan` is the same in both calls, a SORT or NULL for the table's own. FE_UNSUPPORTED while the stream is captured:
 * the count could not be read. */
FE_EXPORT FeStatus fe_cuda_embedding_sparse_count(const FePlan* plan, const FeBackwardArgs* args, int64_t* count,
                                                  void* workspace, size_t* workspace_bytes, void* stream);
FE_EXPORT FeStatus fe_cuda_embedding_sparse_backward(const FePlan* plan, const FeBackwardArgs* args, int64_t count,
                                                     int64_t* rows, void* workspace, size_t* workspace_bytes,
                                                     void* stream);

#ifdef __cplusplus
} /* extern "C" */
#endif

#endif /* FAST_EMBEDDING_H_ */
