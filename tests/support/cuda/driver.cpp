// The kernels of one .cu file, launched by name: as a shared library for ctypes or, with CUDA_ON_CPU_MAIN, as a program
// that runs a file of cases, for the sanitizers. emulator.py builds both and writes the file.
#include "cuda_on_cpu.h"

#include <cstdlib>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include <sanitizer/asan_interface.h>

// In an unnamed namespace, the shared variables of templates are plain local symbols; others may not share a section
// with those of functions. The file can include nothing but what is included above.
namespace {
#define alignas(bytes) __attribute__((aligned(bytes)))  // g++ does not take the standard's form after __shared__
#include CUDA_ON_CPU_SOURCE
#undef alignas
}

namespace cuda_on_cpu {

template <class T>
T load(const void* argument) {
    T value;
    memcpy(&value, argument, sizeof value);
    return value;
}

// Calls a kernel with arguments as cuLaunchKernel takes them: by address, one per parameter.
template <auto kernel>
struct Signature;
template <class... Parameters, void (*kernel)(Parameters...)>
struct Signature<kernel> {
    static constexpr unsigned count = sizeof...(Parameters);
    static constexpr unsigned long long sizes[count + 1] = {sizeof(Parameters)..., 0};
    template <size_t... i>
    static void call(const void* const* arguments, std::index_sequence<i...>) {
        kernel(load<Parameters>(arguments[i])...);
    }
    static void run(const void* const* arguments) { call(arguments, std::make_index_sequence<count>()); }
};

struct Kernel {
    const char* name;
    void (*run)(const void* const* arguments);
    unsigned parameter_count;
    const unsigned long long* parameter_sizes;
};

#define CUDA_ON_CPU_KERNEL(name) {#name, &Signature<&name>::run, Signature<&name>::count, Signature<&name>::sizes},
static const Kernel kernels[] = {
#include CUDA_ON_CPU_KERNELS
};

static const Kernel* find(const char* name) {
    for (const Kernel& kernel : kernels)
        if (!strcmp(kernel.name, name)) return &kernel;
    return nullptr;
}

}  // namespace cuda_on_cpu

#define CUDA_ON_CPU_EXPORT extern "C" __attribute__((visibility("default")))

// What went wrong in the last launch, in one line.
CUDA_ON_CPU_EXPORT const char* cuda_on_cpu_error() { return cuda_on_cpu::machine.message; }

// The number of parameters of a kernel, and the size of each; -1 if there is no such kernel.
CUDA_ON_CPU_EXPORT int cuda_on_cpu_parameters(const char* kernel, const unsigned long long** sizes) {
    const cuda_on_cpu::Kernel* found = cuda_on_cpu::find(kernel);
    if (!found) return -1;
    *sizes = found->parameter_sizes;
    return int(found->parameter_count);
}

// 0, or 1: see cuda_on_cpu_error(). arguments[i] is the address of the i-th argument.
CUDA_ON_CPU_EXPORT int cuda_on_cpu_launch(const char* kernel, unsigned grid, unsigned block,
                                          const void* const* arguments, unsigned long long seed) {
    const cuda_on_cpu::Kernel* found = cuda_on_cpu::find(kernel);
    if (!found) {
        snprintf(cuda_on_cpu::machine.message, sizeof cuda_on_cpu::machine.message, "there is no kernel %s", kernel);
        return 1;
    }
    return !cuda_on_cpu::launch(found->name, found->run, grid, block, arguments, seed);
}

#ifdef CUDA_ON_CPU_MAIN

namespace {

[[noreturn]] void die(const char* what) {
    fprintf(stderr, "%s\n", what);
    exit(2);
}

// The file of cases: 64-bit numbers in this machine's byte order, and blobs, which are a size and bytes. It is read at
// once.
//
//     number of cases, then for each:
//         blob: kernel's name;  grid, block, seed
//         number of buffers, then for each:    alignment;  1 if its content is an output, else 0;  blob: content
//         number of arguments, then for each:  blob: value
//             number of addresses in it, then for each:  offset in value, buffer, offset in buffer
//
// The file of outputs is the content of the buffers that are outputs, one after another.
class Reader {
public:
    explicit Reader(const char* path) {
        FILE* file = fopen(path, "rb");
        if (!file) die("the file of cases does not open");
        char part[1 << 16];
        while (size_t count = fread(part, 1, sizeof part, file)) data.insert(data.end(), part, part + count);
        fclose(file);
    }
    unsigned long long number() {
        unsigned long long value;
        memcpy(&value, take(sizeof value), sizeof value);
        return value;
    }
    std::vector<char> blob() {
        const unsigned long long size = number();
        const char* bytes = take(size);
        return std::vector<char>(bytes, bytes + size);
    }

private:
    const char* take(size_t size) {
        if (size > data.size() - place) die("the file of cases ends early");
        place += size;
        return data.data() + place - size;
    }
    std::vector<char> data;
    size_t place = 0;
};

// Memory that ASan guards on both sides: after it to the byte, and before it if the alignment is at least 8. The
// address is an odd multiple of the alignment, so that a kernel cannot rely on more than it asked for; what precedes it
// in its block is made inaccessible.
class Buffer {
public:
    Buffer(const std::vector<char>& content, size_t alignment, bool is_output)
        : size(content.size()), is_output(is_output) {
        if (posix_memalign(&block, alignment < 8 ? 16 : 2 * alignment, alignment + size)) die("no memory for a buffer");
        address = static_cast<char*>(block) + alignment;
        if (size) memcpy(address, content.data(), size);
        ASAN_POISON_MEMORY_REGION(block, alignment);
    }
    Buffer(Buffer&& other) noexcept
        : address(other.address),
          size(other.size),
          is_output(other.is_output),
          block(std::exchange(other.block, nullptr)) {}
    ~Buffer() { free(block); }

    char* address;
    size_t size;
    bool is_output;

private:
    void* block;
};

void run_case(Reader& reader, FILE* outputs) {
    std::vector<char> name = reader.blob();
    name.push_back(0);
    const unsigned grid = unsigned(reader.number()), block = unsigned(reader.number());
    const unsigned long long seed = reader.number();
    std::vector<Buffer> buffers;
    for (unsigned long long count = reader.number(); count; count--) {
        const size_t alignment = reader.number();
        const bool is_output = reader.number() != 0;
        buffers.emplace_back(reader.blob(), alignment, is_output);
    }
    std::vector<std::vector<char>> arguments;
    std::vector<const void*> pointers;
    for (unsigned long long count = reader.number(); count; count--) {
        std::vector<char>& value = arguments.emplace_back(reader.blob());
        for (unsigned long long addresses = reader.number(); addresses; addresses--) {
            const size_t offset = reader.number(), buffer = reader.number(), offset_in_buffer = reader.number();
            const uintptr_t address = reinterpret_cast<uintptr_t>(buffers.at(buffer).address) + offset_in_buffer;
            if (offset + sizeof address > value.size()) die("an address lies outside its argument");
            memcpy(value.data() + offset, &address, sizeof address);
        }
        pointers.push_back(value.data());
    }
    const unsigned long long* sizes;
    const int parameters = cuda_on_cpu_parameters(name.data(), &sizes);
    if (parameters < 0) die("there is no such kernel");
    if (size_t(parameters) != arguments.size()) die("the kernel has another number of parameters");
    for (size_t i = 0; i < arguments.size(); i++)
        if (arguments[i].size() != sizes[i]) die("an argument has another size than the kernel's parameter");
    if (cuda_on_cpu_launch(name.data(), grid, block, pointers.data(), seed)) die(cuda_on_cpu_error());
    for (const Buffer& buffer : buffers)
        if (buffer.is_output && fwrite(buffer.address, 1, buffer.size, outputs) != buffer.size)
            die("the file of outputs cannot be written");
}

}  // namespace

int main(int argc, char** argv) {
    if (argc != 3) die("arguments: file of cases, file of outputs");
    Reader reader(argv[1]);
    FILE* outputs = fopen(argv[2], "wb");
    if (!outputs) die("the file of outputs does not open");
    const unsigned long long count = reader.number();
    for (unsigned long long i = 0; i < count; i++) {
        fprintf(stderr, "case %llu\n", i);  // names the culprit if the sanitizers end the program
        run_case(reader, outputs);
    }
    return fclose(outputs) ? 2 : 0;
}

#endif
