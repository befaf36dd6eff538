/* init_tiny.c -- the shortest life of a Linux guest: say how long the boot took, then reset the machine.
 *
 * Prints:  init: up SECONDS IDLE-SECONDS       (what /proc/uptime holds)
 */
#include "user.h"

int main(int argc, char **argv)
{
    char uptime[64];
    long size, file;
    (void)argc, (void)argv;

    CALL2(__NR_mkdir, "/proc", 0555);
    CALL5(__NR_mount, "proc", "/proc", "proc", 0, 0);
    file = checked("init: open /proc/uptime", CALL3(__NR_open, "/proc/uptime", O_RDONLY, 0));
    size = CALL3(__NR_read, file, uptime, sizeof uptime - 1);
    if (size <= 0)
        return 1;
    uptime[size - 1] = 0; /* in place of the line's end */
    text("init: up ");
    say(uptime);
    return 0;
}
