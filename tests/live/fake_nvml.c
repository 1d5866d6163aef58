/* A stand-in for libnvidia-ml.so.1 behind the same C functions, so that the real pynvml is tested down to ctypes.
 *
 * Its cards live in a file that $FAKE_NVML names, mapped by everyone: tests read what was set and change what is read,
 * and the watchdog, another process, sees the same cards. The layout is fake_nvml.py's. */
#include <fcntl.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

enum { SUCCESS = 0, UNINITIALIZED = 1, INVALID = 2, NOT_FOUND = 6, INSUFFICIENT_SIZE = 7, UNKNOWN = 999 };
enum { LOWEST = 345, STEP = 15, CLOCKS = 110, CARDS = 4, LOGGED = 4096, FIELD_POWER_INSTANT = 186 };
enum { LOCK = 1, RESET = 2 };

typedef struct {
    uint32_t locked_mhz; /* 0: unlocked */
    uint32_t clock_mhz;  /* 0: the locked one, or the highest */
    uint32_t power_mw;
    uint32_t lock_error, reset_error, read_error, power_error;
    uint32_t call_ms; /* how long a clock call takes */
    uint64_t energy_mj, reasons;
} card_t;

typedef struct {
    uint32_t card, what, mhz, pid;
    uint64_t from_ns, to_ns;
} call_t;

typedef struct {
    uint32_t init_error, cards, calls, unused;
    card_t card[CARDS];
    call_t call[LOGGED];
} state_t;

static state_t *state;

static uint64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

static int clock_call(card_t *card, uint32_t what, uint32_t mhz, uint32_t error) {
    uint64_t from_ns = now_ns();
    struct timespec wait = {card->call_ms / 1000, (long)(card->call_ms % 1000) * 1000000};
    nanosleep(&wait, NULL);
    if (error == SUCCESS) card->locked_mhz = mhz;
    uint32_t at = __atomic_fetch_add(&state->calls, 1, __ATOMIC_SEQ_CST);
    if (at < LOGGED) {
        call_t made = {(uint32_t)(card - state->card), what, mhz, (uint32_t)getpid(), from_ns, now_ns()};
        state->call[at] = made;
    }
    return (int)error;
}

int nvmlInitWithFlags(unsigned flags) {
    (void)flags;
    if (!state) {
        const char *name = getenv("FAKE_NVML");
        int file = name ? open(name, O_RDWR) : -1;
        if (file < 0) return UNKNOWN;
        void *map = mmap(NULL, sizeof(state_t), PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
        close(file);
        if (map == MAP_FAILED) return UNKNOWN;
        state = map;
    }
    return (int)state->init_error;
}
int nvmlShutdown(void) { return SUCCESS; }

static const char *told(int code) {
    switch (code) {
    case 3: return "Not Supported";
    case 4: return "Insufficient Permissions";
    case 9: return "Driver Not Loaded";
    case 15: return "GPU is lost";
    default: return "Unknown Error";
    }
}
const char *nvmlErrorString(int code) { return told(code); }

int nvmlSystemGetDriverVersion(char *out, unsigned size) {
    strncpy(out, "fake", size);
    return SUCCESS;
}
int nvmlDeviceGetCount_v2(unsigned *count) {
    *count = state->cards;
    return SUCCESS;
}
int nvmlDeviceGetHandleByIndex_v2(unsigned index, card_t **card) {
    if (index >= state->cards) return INVALID;
    *card = &state->card[index];
    return SUCCESS;
}
int nvmlDeviceGetUUID(card_t *card, char *out, unsigned size) {
    strncpy(out, "GPU-fake-0", size);
    out[9] = (char)('0' + (card - state->card));
    return SUCCESS;
}
int nvmlDeviceGetName(card_t *card, char *out, unsigned size) {
    (void)card;
    strncpy(out, "Fake H100", size);
    return SUCCESS;
}
int nvmlDeviceGetSupportedMemoryClocks(card_t *card, unsigned *count, unsigned *mhz) {
    (void)card;
    if (!mhz || *count < 2) {
        *count = 2;
        return INSUFFICIENT_SIZE;
    }
    mhz[0] = 2619;
    mhz[1] = 1593;
    return SUCCESS;
}
int nvmlDeviceGetSupportedGraphicsClocks(card_t *card, unsigned memory_mhz, unsigned *count, unsigned *mhz) {
    (void)card;
    if (memory_mhz != 2619) return NOT_FOUND;
    if (!mhz || *count < CLOCKS) {
        *count = CLOCKS;
        return INSUFFICIENT_SIZE;
    }
    for (unsigned i = 0; i < CLOCKS; i++) mhz[i] = LOWEST + STEP * (CLOCKS - 1 - i);
    return SUCCESS;
}
int nvmlDeviceSetGpuLockedClocks(card_t *card, unsigned lowest, unsigned highest) {
    if (lowest != highest) return INVALID;
    return clock_call(card, LOCK, highest, card->lock_error);
}
int nvmlDeviceResetGpuLockedClocks(card_t *card) { return clock_call(card, RESET, 0, card->reset_error); }

int nvmlDeviceGetClockInfo(card_t *card, int type, unsigned *mhz) {
    if (type != 1) return INVALID; /* NVML_CLOCK_SM */
    *mhz = card->clock_mhz ? card->clock_mhz : card->locked_mhz ? card->locked_mhz : LOWEST + STEP * (CLOCKS - 1);
    return (int)card->read_error;
}
int nvmlDeviceGetTotalEnergyConsumption(card_t *card, unsigned long long *mj) {
    *mj = card->energy_mj;
    return (int)card->read_error;
}
int nvmlDeviceGetCurrentClocksEventReasons(card_t *card, unsigned long long *reasons) {
    *reasons = card->reasons;
    return (int)card->read_error;
}

typedef struct { /* nvmlFieldValue_t */
    uint32_t field, scope;
    int64_t timestamp, latency_us;
    int type, result;
    union { double d; unsigned ui; unsigned long long ull; } value;
} field_t;

int nvmlDeviceGetFieldValues(card_t *card, int count, field_t *values) {
    for (int i = 0; i < count; i++) {
        if (values[i].field != FIELD_POWER_INSTANT) return INVALID;
        values[i].type = 1; /* unsigned int */
        values[i].result = (int)card->power_error;
        values[i].value.ui = card->power_mw;
    }
    return (int)card->read_error;
}
