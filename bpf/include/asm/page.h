/* For the sizes of ring buffers, which are given in bytes and are multiples of any page size. */
#define PAGE_SIZE 4096
