/* For the sizes of ring buffers, which the probe does not use. */
#define PAGE_SIZE 4096
