// Calls a function of a library of another machine, in an emulator: emulated_call LIBRARY FUNCTION <arguments >results
//
// An argument is a tag and its content: 'i' an integer of 8 bytes; 'b' the size and the bytes of a buffer; 's' the
// number of fields of a struct and its fields, which are again arguments, of 8 bytes each. All buffers are written
// back after the call, behind what the function returns.

#include <cstdint>
#include <cstdio>
#include <deque>
#include <dlfcn.h>
#include <vector>

static std::deque<std::vector<char>> buffers;

static int64_t read_integer()
{
    int64_t value;
    if (fread(&value, sizeof value, 1, stdin) != 1) throw 1;
    return value;
}

static int64_t read_argument(int tag)
{
    if (tag == 'i') return read_integer();
    auto &buffer = buffers.emplace_back();
    const int64_t size = read_integer();
    if (tag == 'b') {
        buffer.resize(size);
        if (fread(buffer.data(), 1, size, stdin) != (size_t)size) throw 1;
        return (int64_t)buffer.data();
    }
    auto *fields = new int64_t[size]; // until the end
    for (int64_t i = 0; i < size; i++) fields[i] = read_argument(getchar());
    return (int64_t)fields;
}

int main(int, char **argv)
{
    void *library = dlopen(argv[1], RTLD_NOW);
    if (!library) return fprintf(stderr, "%s\n", dlerror()), 1;
    using Function = int64_t (*)(int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t);
    auto function = (Function)dlsym(library, argv[2]);
    int64_t arguments[8] = {}, count = 0; // as many as registers hold: the function takes those that it has
    for (int tag; (tag = getchar()) != EOF;) arguments[count++] = read_argument(tag);
    const int64_t returned = function(arguments[0], arguments[1], arguments[2], arguments[3], arguments[4],
                                      arguments[5], arguments[6], arguments[7]);
    fwrite(&returned, sizeof returned, 1, stdout); // of no meaning where the function returns nothing
    for (const auto &buffer : buffers) fwrite(buffer.data(), 1, buffer.size(), stdout);
}
