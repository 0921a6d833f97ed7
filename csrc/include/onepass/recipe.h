// The constants of engine/reference/rng.py: one place for the CPU and the GPU.
#pragma once
#include <cstdint>

namespace onepass::recipe {

inline constexpr uint32_t MULTIPLIER_0 = 0xD2511F53u, MULTIPLIER_1 = 0xCD9E8D57u;
inline constexpr uint32_t WEYL_0 = 0x9E3779B9u, WEYL_1 = 0xBB67AE85u;
inline constexpr int ROUNDS = 10;

inline constexpr float UNIT_STEP = 0x1p-32f, UNIT_MIDDLE = 0x1p-33f, UNIT_MOST = 1.0f - 0x1p-24f;

inline constexpr int32_t SQRT_HALF_BITS = 0x3F3504F3;
inline constexpr float LN2_HIGH = 0.693359375f, LN2_LOW = -2.1219444e-4f;
inline constexpr float LN_0 = -0.07636439f, LN_1 = 0.12762217f, LN_2 = -0.1315961f, LN_3 = 0.1420158f,
                       LN_4 = -0.16623409f, LN_5 = 0.20001242f, LN_6 = -0.2500082f, LN_7 = 0.3333333f;

inline constexpr float HALF_PI_HIGH = 1.5707964f, HALF_PI_LOW = -4.371139e-08f;
inline constexpr float SIN_0 = -0.0046037226f, SIN_1 = 0.07968108f, SIN_2 = -0.6459636f;
inline constexpr float COS_0 = 0.0008944864f, COS_1 = -0.020855596f, COS_2 = 0.25366855f, COS_3 = -1.2337005f;

}  // namespace onepass::recipe
