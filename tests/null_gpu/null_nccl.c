/* NCCL's collectives between the processes of one machine, through files in NULL_GPU_FOLDER.

   Each call is done when it returns: device memory is host memory here, see null_gpu.c. A send waits
   for its receiver, as NCCL buffers little, and a collective must be the same on all ranks: where
   NCCL would hang or mix up data, this hangs or ends the process. Nothing removes the files of
   collectives but the owner of the folder. */

#include <fcntl.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { SUCCESS = 0, FAILED = 1 };

enum { MOST_RANKS = 64, MOST_PENDING = 4096, ID_BYTES = 128 };
enum { INT8, UINT8, INT32, UINT32, INT64, UINT64, FLOAT16, FLOAT32, FLOAT64, BFLOAT16 };
enum { SUM, PRODUCT, MAXIMUM, MINIMUM };

typedef struct {
    char name[40];
    int size, rank;
    long collectives, sent[MOST_RANKS], received[MOST_RANKS];
} Communicator;

typedef struct {
    char bytes[ID_BYTES];
} UniqueId;

static size_t width_of(int type) {
    static const size_t widths[] = {1, 1, 4, 4, 8, 8, 2, 4, 8, 2, 1, 1};
    return widths[type];
}

static void path_of(char *out, size_t bytes, Communicator *of, const char *key) {
    snprintf(out, bytes, "%s/%s-%s", getenv("NULL_GPU_FOLDER"), of->name, key);
}

static void publish(Communicator *of, const char *key, const void *data, size_t bytes) {
    char path[512], unfinished[520];
    path_of(path, sizeof path, of, key);
    snprintf(unfinished, sizeof unfinished, "%s.part", path);
    int file = open(unfinished, O_CREAT | O_WRONLY | O_TRUNC, 0600);
    for (size_t done = 0; done < bytes;) {
        ssize_t n = write(file, (const char *)data + done, bytes - done);
        if (n <= 0) abort();
        done += n;
    }
    close(file);
    rename(unfinished, path);
}

static void differ(Communicator *of, const char *key) {
    fprintf(stderr, "null NCCL: rank %d of %d called another operation, or of another size, than "
            "the rank of %s-%s\n", of->rank, of->size, of->name, key);
    abort();
}

static void fetch(Communicator *of, const char *key, void *into, size_t bytes) {
    char path[512];
    path_of(path, sizeof path, of, key);
    int file;
    while ((file = open(path, O_RDONLY)) < 0) usleep(200);
    for (size_t done = 0; done < bytes;) {
        ssize_t n = read(file, (char *)into + done, bytes - done);
        if (n <= 0) differ(of, key);
        done += n;
    }
    char more;
    if (read(file, &more, 1) > 0) differ(of, key);
    close(file);
}

/* Numbers of 16 bits are left as they are: what they stand for was never computed. */
static void reduce(void *into, const void *other, size_t count, int type, int operation) {
#define REDUCE(T)                                                                   \
    for (size_t i = 0; i < count; i++) {                                            \
        T *a = (T *)into + i, b = ((const T *)other)[i];                            \
        *a = operation == MAXIMUM   ? (*a > b ? *a : b)                             \
             : operation == MINIMUM ? (*a < b ? *a : b)                             \
             : operation == PRODUCT ? *a * b                                        \
                                    : *a + b;                                       \
    }
    switch (type) {
        case UINT8: REDUCE(uint8_t) break;
        case INT32: REDUCE(int32_t) break;
        case INT64: REDUCE(int64_t) break;
        case FLOAT32: REDUCE(float) break;
        case FLOAT64: REDUCE(double) break;
    }
}

static void key_of(char *out, long number, int rank) { sprintf(out, "all-%ld-%d", number, rank); }

enum { KIND_BYTES = 16 };

/* Tells all the data of this rank, and hands what each rank told to `each`, in their order. `kind`
   is the operation with its arguments, the same on all ranks. */
static void exchange(Communicator *of, const char *kind, const void *data, size_t bytes,
                     void (*each)(int rank, const char *data, void *context), void *context) {
    char key[64];
    long number = of->collectives++;
    char *told = calloc(1, KIND_BYTES + bytes), *other = malloc(KIND_BYTES + bytes);
    strncpy(told, kind, KIND_BYTES);
    memcpy(told + KIND_BYTES, data, bytes);
    key_of(key, number, of->rank);
    publish(of, key, told, KIND_BYTES + bytes);
    for (int rank = 0; rank < of->size; rank++) {
        key_of(key, number, rank);
        fetch(of, key, other, KIND_BYTES + bytes);
        if (memcmp(told, other, KIND_BYTES)) differ(of, key);
        each(rank, other + KIND_BYTES, context);
    }
    free(told);
    free(other);
}

typedef struct {
    char *into;
    size_t offset, bytes, count;
    int type, operation;
} Result;

static void keep(int rank, const char *data, void *context) {
    Result *result = context;
    memcpy(result->into + rank * result->bytes, data + result->offset, result->bytes);
}

static void add_up(int rank, const char *data, void *context) {
    Result *result = context;
    data += result->offset;
    if (rank == 0) memcpy(result->into, data, result->bytes);
    else reduce(result->into, data, result->count, result->type, result->operation);
}

int ncclAllGather(const void *from, void *to, size_t count, int type, Communicator *of) {
    Result result = {to, 0, count * width_of(type)};
    exchange(of, "gather", from, result.bytes, keep, &result);
    return SUCCESS;
}

int ncclAlltoAll(const void *from, void *to, size_t count, int type, Communicator *of) {
    size_t bytes = count * width_of(type);
    Result result = {to, of->rank * bytes, bytes};
    exchange(of, "all to all", from, bytes * of->size, keep, &result);
    return SUCCESS;
}

static int reduced(const void *from, void *to, size_t count, int type, int operation,
                   Communicator *of, int parts) {
    size_t bytes = count * width_of(type);
    char *sum = malloc(bytes + 1);
    Result result = {sum, parts > 1 ? of->rank * bytes : 0, bytes, count, type, operation};
    char kind[KIND_BYTES];
    snprintf(kind, sizeof kind, "%d of %d, %d", operation, type, parts);
    exchange(of, kind, from, bytes * parts, add_up, &result);
    memcpy(to, sum, bytes);
    free(sum);
    return SUCCESS;
}

int ncclAllReduce(const void *from, void *to, size_t count, int type, int operation, Communicator *of) {
    return reduced(from, to, count, type, operation, of, 1);
}

int ncclReduce(const void *from, void *to, size_t count, int type, int operation, int root,
               Communicator *of) {
    return reduced(from, to, count, type, operation, of, 1);
}

int ncclReduceScatter(const void *from, void *to, size_t count, int type, int operation,
                      Communicator *of) {
    return reduced(from, to, count, type, operation, of, of->size);
}

int ncclBroadcast(const void *from, void *to, size_t count, int type, int root, Communicator *of) {
    char key[64];
    key_of(key, of->collectives++, root);
    if (of->rank == root) publish(of, key, from, count * width_of(type));
    fetch(of, key, to, count * width_of(type));
    return SUCCESS;
}

int ncclBcast(void *data, size_t count, int type, int root, Communicator *of) {
    return ncclBroadcast(data, data, count, type, root, of);
}

/* What is sent and received waits for the end of the group, and a send then for its receiver. */

static __thread int group_depth = 0, pending_count = 0;
static __thread struct {
    Communicator *of;
    int is_send; /* which is published already */
    void *into;
    size_t bytes;
    char key[64];
} pending[MOST_PENDING];

static void end_pending(void) {
    char path[512];
    for (int i = 0; i < pending_count; i++) {
        if (pending[i].is_send) continue;
        fetch(pending[i].of, pending[i].key, pending[i].into, pending[i].bytes);
        path_of(path, sizeof path, pending[i].of, pending[i].key);
        unlink(path);
    }
    for (int i = 0; i < pending_count; i++) {
        path_of(path, sizeof path, pending[i].of, pending[i].key);
        while (pending[i].is_send && !access(path, F_OK)) usleep(200);
    }
    pending_count = 0;
}

int ncclGroupStart(void) {
    group_depth++;
    return SUCCESS;
}

int ncclGroupEnd(void) {
    if (--group_depth == 0) end_pending();
    return SUCCESS;
}

static void begin_pending(Communicator *of, int is_send, int from, int to, long number, void *into,
                          size_t bytes) {
    int i = pending_count++;
    pending[i].of = of;
    pending[i].is_send = is_send;
    pending[i].into = into;
    pending[i].bytes = bytes;
    sprintf(pending[i].key, "%d-to-%d-%ld", from, to, number);
}

int ncclSend(const void *data, size_t count, int type, int to, Communicator *of) {
    begin_pending(of, 1, of->rank, to, of->sent[to]++, NULL, 0);
    publish(of, pending[pending_count - 1].key, data, count * width_of(type));
    if (!group_depth) end_pending();
    return SUCCESS;
}

int ncclRecv(void *into, size_t count, int type, int from, Communicator *of) {
    begin_pending(of, 0, from, of->rank, of->received[from]++, into, count * width_of(type));
    if (!group_depth) end_pending();
    return SUCCESS;
}

int ncclGetUniqueId(UniqueId *out) {
    int file = open("/dev/urandom", O_RDONLY);
    ssize_t n = read(file, out, sizeof *out);
    close(file);
    return n == sizeof *out ? SUCCESS : FAILED;
}

static int make_communicator(Communicator **out, int size, const UniqueId *id, int rank) {
    *out = calloc(1, sizeof **out);
    for (int i = 0; i < 16; i++) sprintf((*out)->name + 2 * i, "%02x", (uint8_t)id->bytes[i]);
    (*out)->size = size;
    (*out)->rank = rank;
    return SUCCESS;
}

int ncclCommInitRank(Communicator **out, int size, UniqueId id, int rank) {
    return make_communicator(out, size, &id, rank);
}

int ncclCommInitRankConfig(Communicator **out, int size, UniqueId id, int rank) {
    return make_communicator(out, size, &id, rank);
}

int ncclCommInitRankScalable(Communicator **out, int size, int rank, int ids, UniqueId *id) {
    return make_communicator(out, size, id, rank);
}

typedef struct {
    int color, key, own_rank, size, rank;
} Split;

static void count_members(int rank, const char *data, void *context) {
    Split *own = context;
    const int *other = (const int *)data; /* color, key */
    if (other[0] != own->color) return;
    own->size++;
    own->rank += other[1] < own->key || (other[1] == own->key && rank < own->own_rank);
}

int ncclCommSplit(Communicator *of, int color, int key, Communicator **out) {
    long number = of->collectives;
    Split own = {color, key, of->rank, 0, 0};
    int mine[] = {color, key};
    exchange(of, "split", mine, sizeof mine, count_members, &own);
    *out = NULL;
    if (color < 0) return SUCCESS;
    *out = calloc(1, sizeof **out);
    snprintf((*out)->name, sizeof (*out)->name, "%.16s_%lx_%x", of->name, number, color);
    (*out)->size = own.size;
    (*out)->rank = own.rank;
    return SUCCESS;
}

int ncclCommCount(Communicator *of, int *out) {
    *out = of->size;
    return SUCCESS;
}

int ncclCommUserRank(Communicator *of, int *out) {
    *out = of->rank;
    return SUCCESS;
}

int ncclCommGetAsyncError(Communicator *of, int *out) {
    *out = SUCCESS;
    return SUCCESS;
}

int ncclGetVersion(int *out) {
    *out = 22907;
    return SUCCESS;
}

const char *ncclGetErrorString(int error) { return error ? "error of the null NCCL" : "none"; }
const char *ncclGetLastError(void) { return "none"; }
