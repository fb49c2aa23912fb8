/* @network@: what the network takes and returns. */
#ifndef NETWORK_H
#define NETWORK_H

#include <stddef.h>

#define NETWORK_CHANNELS @channels@
#define NETWORK_HEIGHT @height@
#define NETWORK_WIDTH @width@
#define NETWORK_TIMESTEPS @timesteps@ /* frames of a sample; an image is shown so often */
#define NETWORK_CLASSES @classes@
#define NETWORK_COUNTS @counts@ /* 1: frames count events; 0: frames are normalised images */

extern const unsigned char network[];
extern const size_t network_size;

#endif
