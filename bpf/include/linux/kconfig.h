/* The one option BCC's own headers ask for. */
#define CONFIG_BPF_SYSCALL 1
