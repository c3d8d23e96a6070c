//! `ssh-tunnel://` URLs, and what is told of wrong ones.

use std::path::PathBuf;

use super::super::remote::redacted;
use super::super::{Remote, RemoteError};

fn told(text: &str) -> String {
    Remote::parse(text).unwrap_err().to_string()
}

#[test]
fn urls_mean_what_they_mean_to_the_peer() {
    let remote =
        Remote::parse("ssh-tunnel://core@192.168.127.2/run/podman/podman.sock?key=/home/a/.ssh/id").unwrap();
    let expected = Remote {
        target: "192.168.127.2:22".parse().unwrap(),
        user: "core".to_owned(),
        password: None,
        path: "/run/podman/podman.sock".to_owned(),
        key: PathBuf::from("/home/a/.ssh/id"),
        passphrase: None,
        secure: false,
    };
    assert_eq!(remote, expected);

    let remote = Remote::parse(
        "SSH-Tunnel://co%72e:p%40ss@192.168.127.2:2222/run/a%20b.sock?x&key=%2Fhome%2Fmy+key&key=second\
         &passphrase=a%26b+c%2Bd&secure=1#rest",
    )
    .unwrap();
    let expected = Remote {
        target: "192.168.127.2:2222".parse().unwrap(),
        user: "core".to_owned(),
        password: Some("p@ss".to_owned()),
        path: "/run/a b.sock".to_owned(),
        key: PathBuf::from("/home/my key"),
        passphrase: Some("a&b c+d".to_owned()),
        secure: true,
    };
    assert_eq!(remote, expected);

    for (value, secure) in [
        ("t", true),
        ("TRUE", true),
        ("True", true),
        ("yes", false),
        ("", false),
        ("0", false),
    ] {
        let remote = Remote::parse(&format!("ssh-tunnel://u@10.0.0.1/s?key=k&secure={value}")).unwrap();
        assert_eq!(remote.secure, secure, "{value}");
    }
    let remote = Remote::parse("ssh-tunnel://u@[fd00::2]:23/s?key=k").unwrap();
    assert_eq!(remote.target, "[fd00::2]:23".parse().unwrap());
    let remote = Remote::parse("ssh-tunnel://u@[fd00::2]/s?key=k").unwrap();
    assert_eq!(remote.target, "[fd00::2]:22".parse().unwrap());
    let remote = Remote::parse("ssh-tunnel://u@10.0.0.1:/s?key=k").unwrap();
    assert_eq!(remote.target, "10.0.0.1:22".parse().unwrap());
}

#[test]
fn what_is_wrong_is_told_in_the_peers_words() {
    let no_key = "key not provided for unix-ssh connection";
    assert_eq!(told("ssh-tunnel://core@192.168.127.2/run/a.sock"), no_key);
    assert_eq!(told("ssh-tunnel://core@192.168.127.2/run/a.sock?key="), no_key);
    assert_eq!(told("ssh-tunnel://core@192.168.127.2/run/a.sock?key=%zz"), no_key);
    let no_path = "remote uri must contain a path to a socket file";
    assert_eq!(told("ssh-tunnel://core@192.168.127.2?key=k"), no_path);
    assert_eq!(told("ssh-tunnel://core@192.168.127.2/?key=k"), no_path);
    for (url, scheme) in [
        ("udp://192.168.127.2:53", "udp"),
        ("HTTP://a/b?key=k", "http"),
        ("/run/a.sock", ""),
    ] {
        let expected = format!("remote protocol for unix forwarder is not implemented: {scheme}");
        assert_eq!(told(url), expected);
    }
    assert_eq!(
        told("ssh-tunnel://core:word@192.168.127.2/a%2?key=k&passphrase=phrase"),
        "failed to parse remote uri :ssh-tunnel://core:xxxxx@192.168.127.2/a%2?key=k&passphrase=xxxxx : \
         invalid URL escape in \"/a%2\""
    );
}

#[test]
fn what_the_peer_lets_through_and_then_fails_with_is_refused() {
    assert!(told("ssh-tunnel://192.168.127.2/a?key=k").starts_with("user not provided"));
    assert!(told("ssh-tunnel://:word@192.168.127.2/a?key=k").starts_with("user not provided"));
    for host in ["guest.internal", "", "999.1.1.1", "[fd00::2", "fd00::2"] {
        let text = told(&format!("ssh-tunnel://core@{host}/a?key=k"));
        assert!(text.contains("invalid"), "{host}: {text}");
    }
    for port in ["70000", "ssh", "-1", "+22", "22x"] {
        let text = told(&format!("ssh-tunnel://core@192.168.127.2:{port}/a?key=k"));
        assert!(
            text.ends_with(&format!("invalid port \":{port}\" after host")),
            "{text}"
        );
    }
    let zero = Remote::parse("ssh-tunnel://core@192.168.127.2/a%00b?key=k");
    assert!(matches!(zero, Err(RemoteError::Url { .. })), "{zero:?}");
}

#[test]
fn what_is_shown_has_no_secret_and_is_else_as_it_was_given() {
    for text in [
        "ssh-tunnel://core@192.168.127.2/a@b:c?key=k&secure=true",
        "ssh-tunnel://core@192.168.127.2/a?passphrase",
        "tcp://192.168.127.2:80",
        "text",
        "",
        "://@?&=",
    ] {
        assert_eq!(redacted(text), text);
    }
    for (text, shown) in [
        (
            "ssh-tunnel://u:w@h/a?passphrase=p&key=k",
            "ssh-tunnel://u:xxxxx@h/a?passphrase=xxxxx&key=k",
        ),
        (
            "ssh-tunnel://u@h/a?pass%70hrase=p",
            "ssh-tunnel://u@h/a?pass%70hrase=xxxxx",
        ),
        ("ssh-tunnel://u:w:x@y@h/a", "ssh-tunnel://u:xxxxx@h/a"),
    ] {
        assert_eq!(redacted(text), shown);
    }
}

#[test]
fn no_text_makes_the_reader_panic() {
    let pieces = [
        "ssh-tunnel:",
        "//",
        "u",
        "@",
        ":",
        "[",
        "]",
        "192.168.127.2",
        "/",
        "?",
        "key=",
        "%",
        "%4",
        "é",
        "&",
        "#",
    ];
    let mut state = 1_u64;
    for _ in 0..20_000 {
        let mut text = String::new();
        for _ in 0..12 {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            text.push_str(pieces[usize::try_from(state >> 33).unwrap() % pieces.len()]);
        }
        let _ = (Remote::parse(&text), redacted(&text));
    }
}
