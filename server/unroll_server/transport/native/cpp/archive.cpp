// Debian's libnghttp2.a refers to stderr, in a function for debugging, in a way that only a program can: compiled as
// PIE, not as PIC. The linker's --wrap=stderr turns all references of this module to this copy.
#include <cstdio>

extern "C" {
extern std::FILE* __real_stderr;
[[gnu::visibility("hidden")]] std::FILE* __wrap_stderr = __real_stderr;
}
