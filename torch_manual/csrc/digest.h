// A digest of memory: the same for the same contents, another for others. Always, if they differ in eight
// bytes that are read as one word; else but for a chance of about 2⁻⁶⁴, whatever signs have changed.
#pragma once

#include <cstring>

#include "vector.h"

namespace {

class Digest {
  public:
    Digest() {
        for (uint64_t c = 0; c < chains; c++)
            for (uint64_t lane = 0; lane < lanes; lane++) state[c][lane] = mixed(1 + c * lanes + lane);
    }

    void add(const void* data, int64_t bytes) {
        const char* at = (const char*)data;
        for (; bytes >= block; bytes -= block, at += block) add_block(at);
        if (bytes == 0) return;
        char rest[block] = {};
        memcpy(rest, at, bytes);
        add_block(rest);
    }

    uint64_t value() const {
        Words all = {};
        for (uint64_t c = 0; c < chains; c++) all = mixed(all ^ mixed(mixed(state[c])));
        uint64_t value = 0;
        for (uint64_t lane = 0; lane < lanes; lane++) value = mixed(value ^ all[lane]);
        return value;
    }

  private:
    typedef uint64_t Words __attribute__((vector_size(VECTOR_BYTES)));
    typedef uint64_t Stored __attribute__((vector_size(VECTOR_BYTES), aligned(1), may_alias));
    static constexpr uint64_t lanes = VECTOR_BYTES / 8, chains = 8;  // as many as overlap
    static constexpr int64_t block = chains * VECTOR_BYTES;

    // One to one, so that a difference never gets lost: the factor takes it up, the shifts down. A sign
    // is the highest bit, which a factor leaves alone; so it is taken down beforehand, by a distance at
    // which no other sign lies.
    template <typename T>
    static INLINE T mixed(T x) {
        x ^= x >> 29;
        x *= 0x9e3779b97f4a7c15;
        return x ^ x >> 32;
    }

    INLINE void add_block(const char* at) {
#pragma GCC unroll 8
        for (uint64_t c = 0; c < chains; c++)
            state[c] = mixed(state[c] ^ (Words)((const Stored*)at)[c]);
    }

    Words state[chains];
};

}  // namespace
