#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| cowdisk_fuzz::http(data));
