//! Whatever is given, it is read or refused, and nothing panics. The input is drawn from a seed.

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;

use super::*;
use crate::gvproxy::flags;

/// Marsaglia's xorshift64.
struct Draw(u64);

impl Draw {
    fn below(&mut self, bound: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        usize::try_from(self.0 % u64::try_from(bound).unwrap()).unwrap()
    }

    fn one<T: Clone>(&mut self, of: &[T]) -> T {
        of[self.below(of.len())].clone()
    }

    fn bytes(&mut self) -> Vec<u8> {
        (0..self.below(12))
            .map(|_| u8::try_from(self.below(256)).unwrap())
            .collect()
    }
}

/// Values that are near to right.
const VALUES: [&str; 32] = [
    "",
    "-",
    "--",
    "true",
    "no",
    "~",
    "0",
    "-1",
    "1500",
    "2222",
    "99999999999999999999",
    "0x",
    "1_",
    "10.0.0.0/8",
    "192.168.127.1/24",
    "0.0.0.0/0",
    "255.255.255.255",
    "fd00::/64",
    "::1",
    "unix:///a",
    "unix:///%",
    "unixgram:///b",
    "unixpacket:///c",
    "tcp://:1",
    "tcp://[::1]:0",
    "vsock://:1",
    "[",
    "{",
    "a.b.",
    "5a:94:ef:e4:0c:ee",
    "\u{e9}\u{0}",
    "*",
];

#[test]
fn any_words_are_read_or_refused() {
    let mut draw = Draw(0x9e37_79b9_7f4a_7c15);
    let names: Vec<&str> = flags::names()
        .chain(["h", "nope", "", "-", "=", "debu"])
        .collect();
    let (mut read, mut refused) = (0, 0);
    for _ in 0..20_000 {
        let words: Vec<OsString> = (0..draw.below(6))
            .map(|_| match draw.below(5) {
                0 => OsString::from_vec(draw.bytes()),
                1 => draw.one(&VALUES).into(),
                2 => format!("-{}", draw.one(&names)).into(),
                _ => format!("--{}={}", draw.one(&names), draw.one(&VALUES)).into(),
            })
            .collect();
        let Ok(flags) = Flags::parse(words) else {
            refused += 1;
            continue;
        };
        read += 1;
        let host = Host {
            search_domains: &[],
            exists: &|_| Ok(true),
            is_no_directory: &|_| true,
        };
        if let Err(problems) = Config::resolve(&flags, FileConfig::default(), &host) {
            assert!(!problems.to_string().is_empty());
        }
    }
    assert!(read > 1000 && refused > 1000, "{read} {refused}");
}

#[test]
fn any_file_is_read_or_refused() {
    let mut draw = Draw(0x2545_f491_4f6c_dd1d);
    let whole = include_str!("cases.yaml");
    let (mut read, mut refused) = (0, 0);
    for round in 0..3_000 {
        let text = if round % 3 == 0 {
            // A piece of YAML that was right, with some of it changed.
            let mut bytes = whole.as_bytes()[draw.below(whole.len())..].to_vec();
            bytes.truncate(draw.below(400));
            for _ in 0..draw.below(4) {
                if !bytes.is_empty() {
                    let at = draw.below(bytes.len());
                    bytes[at] = draw.one(b" \n\t:-[]{}#&*!|>'\"%@,\xff\x00");
                }
            }
            String::from_utf8_lossy(&bytes).into_owned()
        } else {
            drawn_file(&mut draw)
        };
        let arguments = ["-config", FILE].map(str::to_owned);
        match Files(vec![]).resolve(&arguments, &text, &[]) {
            Ok(_) => read += 1,
            Err(problems) => {
                assert!(!problems.is_empty() && problems.iter().all(|problem| !problem.is_empty()));
                refused += 1;
            }
        }
    }
    assert!(read > 100 && refused > 1000, "{read} {refused}");
}

/// Known keys with values that may be of the wrong kind.
fn drawn_file(draw: &mut Draw) -> String {
    let mut text = String::new();
    for key in crate::gvproxy::yaml::TOP_KEYS {
        if draw.below(12) == 0 {
            text += &format!("{key}: {}\n", drawn_value(draw, 0));
        }
    }
    if !text.contains("stack:") {
        text += "stack:\n";
        for key in crate::gvproxy::yaml::STACK_KEYS {
            if draw.below(16) == 0 {
                text += &format!("  {key}: {}\n", drawn_value(draw, 0));
            }
        }
    }
    text
}

fn drawn_value(draw: &mut Draw, depth: usize) -> String {
    let keys = [
        "name",
        "records",
        "ip",
        "regexp",
        "defaultIP",
        "socket",
        "identity",
        "qemu",
        "vfkit",
        "defaultAction",
    ];
    match draw.below(if depth > 3 { 2 } else { 5 }) {
        0 => draw.one(&VALUES).replace('\u{0}', ""),
        1 => format!("{:?}", draw.one(&VALUES).replace('\u{0}', "")),
        2 => format!(
            "[{}, {}]",
            drawn_value(draw, depth + 1),
            drawn_value(draw, depth + 1)
        ),
        3 => format!("{{{}: {}}}", draw.one(&keys), drawn_value(draw, depth + 1)),
        _ => format!("{{{:?}: {}}}", draw.one(&VALUES), drawn_value(draw, depth + 1)),
    }
}
