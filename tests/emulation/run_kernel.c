/* Runs a function of a kernel's source file, SOURCE, on arguments from standard input and writes its buffers to standard
   output. CALLS: a case for each function, with P(i), L(i), I(i) and F(i) for the i-th argument as a pointer, long, int
   or float. Input: the function's number, the number of arguments, and for each a tag of 8 bytes: 'p' with the size of a
   buffer and its bytes, 'v' with an integer or 'f' with a double. */

#include SOURCE

#include <stdio.h>
#include <stdlib.h>

#define P(i) ((void *)values[i])
#define L(i) (values[i])
#define I(i) ((int)values[i])
#define F(i) ((float)reals[i])

static void get(void *to, size_t size)
{
    if (fread(to, 1, size, stdin) != size) exit(3);
}

int main(void)
{
    int64_t values[32] = {0}, sizes[32] = {0}, count;
    int64_t function;
    double reals[32] = {0};
    get(&function, 8);
    get(&count, 8);
    for (int64_t i = 0; i < count; i++) {
        int64_t tag;
        get(&tag, 8);
        if (tag == 'p') {
            get(&sizes[i], 8);
            values[i] = (int64_t)malloc(sizes[i] + 1);
            get((void *)values[i], sizes[i]);
        } else {
            get(tag == 'f' ? (void *)&reals[i] : (void *)&values[i], 8);
        }
    }
    switch (function) {
        CALLS
    }
    for (int64_t i = 0; i < count; i++)
        if (sizes[i] && fwrite((void *)values[i], 1, sizes[i], stdout) != (size_t)sizes[i]) return 4;
    return 0;
}
