/* record: a qmail-queue that notes each message that it takes, and keeps nothing of it.

   The note is a line in the file RECORD names, written at once, so that those of many processes do
   not mix: the sender, and length and Adler-32 (RFC 1950) of the message without its first two
   lines, which are Received.  As qmail-queue does, it takes a message only with a whole envelope,
   and exits 54 otherwise. */

#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

static unsigned char buffer[65536];
static char envelope[65536];

int main(void)
{
  unsigned long a = 1, b = 0, length = 0;
  int lines = 0, note, size;
  size_t end = 0;
  ssize_t n, i;

  while ((n = read(0, buffer, sizeof buffer)) > 0)
    for (i = 0; i < n; ++i) {
      if (lines < 2) {
        lines += buffer[i] == '\n';
        continue;
      }
      ++length;
      a = (a + buffer[i]) % 65521;
      b = (b + a) % 65521;
    }
  while (end < sizeof envelope && (n = read(1, envelope + end, sizeof envelope - end)) > 0)
    end += n;
  if (end < 3 || envelope[0] != 'F' || envelope[end - 1] || envelope[end - 2])
    return 54;
  size = snprintf((char *) buffer, sizeof buffer, "%s %lu %lu\n", envelope + 1, length, b << 16 | a);
  note = open(getenv("RECORD"), O_WRONLY | O_APPEND | O_CREAT, 0600);
  return write(note, buffer, size) == size ? 0 : 53;
}
