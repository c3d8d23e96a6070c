//! Outputs that take nothing: a full disk, and a reader that went away. No program of ours panics for it, and
//! the exit code is what it would have been.
#![cfg(unix)]

use std::process::{Command, Stdio};

/// What a panic ends with.
const PANICKED: i32 = 101;

/// A stream whose reader is gone.
fn gone() -> Stdio {
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    writer.into()
}

/// A stream that a full disk is behind.
#[cfg(target_os = "linux")]
fn full() -> Stdio {
    std::fs::OpenOptions::new()
        .write(true)
        .open("/dev/full")
        .unwrap()
        .into()
}

struct Words {
    words: Vec<String>,
    stdin: &'static str,
}

impl Words {
    fn new(words: &[&str]) -> Self {
        Self {
            words: words.iter().map(|w| (*w).to_owned()).collect(),
            stdin: "",
        }
    }

    /// Runs `vnetctl` on these and answers its exit code.
    fn code(&self, stdout: Stdio, stderr: Stdio) -> i32 {
        let home = std::env::temp_dir();
        let mut child = Command::new(env!("CARGO_BIN_EXE_vnetctl"))
            .args(&self.words)
            .env("XDG_STATE_HOME", &home)
            .env("RUST_LOG", "trace")
            .stdin(Stdio::piped())
            .stdout(stdout)
            .stderr(stderr)
            .spawn()
            .unwrap();
        let mut stdin = child.stdin.take().unwrap();
        // It may not read it.
        let _ = std::io::Write::write_all(&mut stdin, self.stdin.as_bytes());
        drop(stdin);
        child.wait().unwrap().code().unwrap_or(-1)
    }
}

fn check(document: &'static str) -> Words {
    Words {
        stdin: document,
        ..Words::new(&["policy", "check", "-"])
    }
}

/// Lines that say something on stderr, and the exit code of each.
fn on_stderr() -> Vec<(Words, i32)> {
    let nowhere = "unix:///proc/nowhere/control.sock";
    vec![
        (check("defaultAction: Deny\n"), 1),
        // It is valid, with a warning.
        (check("defaultAction: deny\nrules: []\n"), 0),
        (Words::new(&["--server", nowhere, "vm", "list"]), 1),
        (
            Words::new(&["--server", nowhere, "grants", "revoke", "aaaa", "bbbb"]),
            1,
        ),
        (Words::new(&["approve"]), 2),
        (Words::new(&["run", "--mode", "loud", "--", "true"]), 125),
        (Words::new(&["__dataplane", "--controlplane", "http://x"]), 2),
        // Both daemons log what they were given before they fail.
        (
            Words::new(&[
                "__dataplane",
                "--controlplane",
                "unix:///proc/nowhere/session.sock",
                "--link-fd",
                "99",
            ]),
            1,
        ),
        (
            Words::new(&[
                "__controlplane",
                "--listen",
                "unix:///proc/nowhere/control.sock",
                "--store",
                "memory:",
            ]),
            1,
        ),
        (Words::new(&["__controlplane", "--log-level", "a=b=c"]), 2),
    ]
}

#[test]
fn words_that_nobody_can_read_change_no_exit_code() {
    for (words, code) in on_stderr() {
        assert_ne!(code, PANICKED);
        assert_eq!(
            words.code(Stdio::null(), Stdio::null()),
            code,
            "as it is: {:?}",
            words.words
        );
        assert_eq!(
            words.code(Stdio::null(), gone()),
            code,
            "closed: {:?}",
            words.words
        );
        #[cfg(target_os = "linux")]
        assert_eq!(words.code(Stdio::null(), full()), code, "full: {:?}", words.words);
    }
}

#[test]
fn data_that_nobody_reads_ends_quietly_and_a_full_disk_is_an_error() {
    let printing = [
        Words::new(&["completions", "bash"]),
        check("defaultAction: deny\ndns: {defaultAction: deny}\n"),
    ];
    for words in printing {
        assert_eq!(words.code(Stdio::null(), Stdio::null()), 0, "{:?}", words.words);
        assert_eq!(words.code(gone(), Stdio::null()), 0, "{:?}", words.words);
        #[cfg(target_os = "linux")]
        assert_eq!(words.code(full(), full()), 1, "{:?}", words.words);
    }
    for help in [&["--help"][..], &["--version"], &["run", "--help"]] {
        let help = Words::new(help);
        assert_eq!(help.code(Stdio::null(), Stdio::null()), 0);
        assert_eq!(help.code(gone(), gone()), 0);
        #[cfg(target_os = "linux")]
        assert_eq!(
            help.code(full(), full()),
            if help.words[0] == "run" { 125 } else { 1 }
        );
    }
}

#[test]
fn data_for_a_stdout_that_is_closed_from_the_start_is_an_error() {
    let script = |redirection: &str, words: &str| {
        let ended = Command::new("sh")
            .args(["-c", &format!("exec \"$0\" {words} {redirection}")])
            .arg(env!("CARGO_BIN_EXE_vnetctl"))
            .stdin(Stdio::null())
            .output()
            .unwrap();
        (ended.status.code(), String::from_utf8(ended.stderr).unwrap())
    };
    for words in ["completions bash", "policy schema", "--help", "--version"] {
        let (code, said) = script(">&-", words);
        assert_eq!(code, Some(1), "{words}: {said}");
        assert!(said.contains("cannot write the output: "), "{words}: {said}");
        // Where it goes nowhere by intention, nothing is lost.
        for nowhere in [">/dev/null", "1<>/dev/null"] {
            assert_eq!(
                script(nowhere, words),
                (Some(0), String::new()),
                "{words} {nowhere}"
            );
        }
    }
}
