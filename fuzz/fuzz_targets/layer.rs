#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| cowdisk_fuzz::layer(data));
