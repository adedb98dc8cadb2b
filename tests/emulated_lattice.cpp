// Filters values and runs a mean field with a library of another machine, in an emulator:
//   emulated_lattice LIBRARY CHANNELS HEIGHT WIDTH SIGMA_XY SIGMA_RGB THREADS <image and values >sums and marginals
//
// The lattices live in the memory of the emulated process, so that one process makes them and uses them.

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <dlfcn.h>
#include <vector>

int main(int, char **argv)
{
    void *library = dlopen(argv[1], RTLD_NOW);
    if (!library) return fprintf(stderr, "%s\n", dlerror()), 1;
    const auto make = (int (*)(void **, const float *, int64_t, int64_t, int64_t, double, double, int64_t, int64_t))
        dlsym(library, "lattices_new");
    const auto filter = (int (*)(void *, const float *, float *, int64_t, int64_t, int64_t, int64_t))
        dlsym(library, "lattices_filter_float");
    const auto mean_field = (int (*)(void *const *, const double *, int64_t, const float *, float *, int64_t, int64_t,
                                     int64_t, int64_t))dlsym(library, "lattices_mean_field");
    const auto release = (void (*)(void *))dlsym(library, "lattices_free");

    const int64_t channels = atoi(argv[2]), height = atoi(argv[3]), width = atoi(argv[4]), threads = atoi(argv[7]);
    const size_t count = channels * height * width;
    std::vector<float> image(3 * height * width), values(count), sums(count), marginals(count);
    if (fread(image.data(), 4, image.size(), stdin) != image.size()) return 2;
    if (fread(values.data(), 4, count, stdin) != count) return 2;

    void *lattices;
    const double strength = 1.5;
    if (make(&lattices, image.data(), 1, height, width, atof(argv[5]), atof(argv[6]), 1, threads)) return 3;
    if (filter(lattices, values.data(), sums.data(), 1, channels, 0, threads)) return 4;
    if (mean_field(&lattices, &strength, 1, values.data(), marginals.data(), 1, channels, 2, threads)) return 5;
    release(lattices);
    fwrite(sums.data(), 4, count, stdout);
    fwrite(marginals.data(), 4, count, stdout);
}
