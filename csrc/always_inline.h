// Functions that must be compiled for the instruction set of whoever calls them, and so never stand alone.

#pragma once

#define LLM2CLIP_INLINE inline __attribute__((always_inline))
