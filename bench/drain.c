/* drain: read descriptors FIRST to LAST to their ends, one after the other, and exit 0.

   With 0 and 1 it is a qmail-queue that accepts every message, with 3 and 3 a checkpassword that
   accepts every user: the least that such programs can do, so that a benchmark counts little else
   than the program that starts them. */

#include <unistd.h>

static char buffer[65536];

int main(void)
{
  int descriptor;

  for (descriptor = FIRST; descriptor <= LAST; ++descriptor)
    while (read(descriptor, buffer, sizeof buffer) > 0)
      ;
  return 0;
}
