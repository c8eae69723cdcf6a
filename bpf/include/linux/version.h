/* BCC only compares versions to choose between old and new helpers; the probe needs 5.10, so say that. */
#define KERNEL_VERSION(a, b, c) (((a) << 16) + ((b) << 8) + (c))
#define LINUX_VERSION_CODE      KERNEL_VERSION(5, 10, 0)
