//! The syntax, in the cases in which Go's differs from others'.

use super::*;

fn words(words: &[&str]) -> Result<Flags, FlagError> {
    Flags::parse(words.iter().map(OsString::from))
}

fn refused(given: &[&str]) -> String {
    words(given).unwrap_err().to_string()
}

#[test]
fn one_dash_and_two_and_both_ways_to_give_a_value_are_one_flag() {
    for given in [
        &["-mtu", "1400"][..],
        &["--mtu", "1400"],
        &["-mtu=1400"],
        &["--mtu=1400"],
        &["-mtu=0x578"],
        &["-mtu", "02570"],
        &["-mtu", "1_400"],
        &["-mtu", "9000", "-mtu", "1400"],
    ] {
        assert_eq!(words(given).unwrap().mtu, Some(1400), "{given:?}");
    }
}

#[test]
fn booleans_take_gos_spellings_and_never_the_next_word() {
    for spelling in ["1", "t", "T", "TRUE", "true", "True"] {
        assert!(
            words(&[&format!("-debug={spelling}")]).unwrap().debug,
            "{spelling}"
        );
    }
    for spelling in ["0", "f", "F", "FALSE", "false", "False"] {
        let given = words(&["-debug", &format!("--debug={spelling}")]).unwrap();
        assert!(!given.debug, "{spelling}");
    }
    for spelling in ["", "yes", "tRUE", "2"] {
        assert_eq!(
            refused(&[&format!("-debug={spelling}")]),
            format!("invalid boolean value {spelling:?} for -debug: parse error (expected true or false)")
        );
    }

    let given = words(&["-debug", "false", "-mtu", "1400"]).unwrap();

    assert!(given.debug);
    assert_eq!(given.mtu, None);
    assert_eq!(given.rest, ["false", "-mtu", "1400"]);
}

#[test]
fn a_value_may_start_with_a_dash_and_hold_equals_signs() {
    assert_eq!(words(&["-ssh-port", "-1"]).unwrap().ssh_port, Some(-1));
    assert_eq!(
        words(&["-pcap", "-debug"]).unwrap().pcap.unwrap(),
        PathBuf::from("-debug")
    );
    assert_eq!(words(&["-pcap=a=b"]).unwrap().pcap.unwrap(), PathBuf::from("a=b"));
}

#[test]
fn two_dashes_or_a_word_end_the_flags() {
    assert_eq!(words(&["--", "-debug"]).unwrap().rest, ["-debug"]);
    assert_eq!(words(&["-", "-debug"]).unwrap().rest, ["-", "-debug"]);
    assert_eq!(words(&["", "-debug"]).unwrap().rest, ["", "-debug"]);
    assert!(!words(&["x", "-debug"]).unwrap().debug);
}

#[test]
fn repeatable_flags_keep_their_order() {
    let given = words(&[
        "-listen",
        "a",
        "--listen=b",
        "-forward-sock=1",
        "-forward-sock",
        "2",
    ])
    .unwrap();

    assert_eq!(given.listen, ["a", "b"]);
    assert_eq!(given.forward_sock, ["1", "2"]);
}

#[test]
fn an_empty_value_is_none() {
    let given = words(&["-config=", "-subnet", "", "-listen-qemu="]).unwrap();

    assert_eq!(given, Flags::default());
    // But where it would take a restriction away.
    for empty in [&["-network-policy", ""][..], &["--network-policy="]] {
        let refused = words(empty).unwrap_err().to_string();
        assert!(
            refused.starts_with("invalid value \"\" for flag -network-policy: it is empty"),
            "{refused}"
        );
    }
}

#[test]
fn what_is_wrong_is_said_in_gos_words() {
    for (given, expected) in [
        (&["-nope"][..], "flag provided but not defined: -nope"),
        (
            &["--lisen", "x"],
            "flag provided but not defined: -lisen (did you mean -listen?)",
        ),
        (
            &["-gateway-ip=1"],
            "flag provided but not defined: -gateway-ip (did you mean -gatewayIP?)",
        ),
        (&["-d"], "flag provided but not defined: -d"),
        (&["---debug"], "bad flag syntax: ---debug"),
        (&["-=1"], "bad flag syntax: -=1"),
        (&["--=1"], "bad flag syntax: --=1"),
        (&["-debug", "-mtu"], "flag needs an argument: -mtu"),
        (
            &["-mtu", "x"],
            "invalid value \"x\" for flag -mtu: parse error (expected a whole number)",
        ),
        (
            &["-mtu="],
            "invalid value \"\" for flag -mtu: parse error (expected a whole number)",
        ),
        (
            &["-mtu", "1500.0"],
            "invalid value \"1500.0\" for flag -mtu: parse error (expected a whole number)",
        ),
        (
            &["-mtu", "9223372036854775808"],
            "invalid value \"9223372036854775808\" for flag -mtu: value out of range",
        ),
    ] {
        let error = words(given).unwrap_err();
        assert_eq!(error.to_string(), expected, "{given:?}");
        assert_eq!(error.exit_code(), 2);
        assert!(
            error
                .whole("gvproxy")
                .starts_with(&format!("{expected}\nUsage of gvproxy:\n"))
        );
    }
}

#[test]
fn help_is_the_usage_and_no_failure() {
    for given in [&["-h"][..], &["--help"], &["-debug", "-help=x", "-nope"]] {
        let error = words(given).unwrap_err();

        assert_eq!(error, FlagError::Help);
        assert_eq!(error.exit_code(), 0);
        assert_eq!(error.whole("gvproxy"), usage("gvproxy"));
    }
    let usage = usage("gvproxy");
    assert!(usage.contains("  -debug\n    \tlog at level debug\n"), "{usage}");
    assert!(
        usage.contains("  -ssh-port int\n") && usage.contains(" (default 2222)\n"),
        "{usage}"
    );
    assert!(
        usage.contains("  -listen value\n") && usage.contains("  -config string\n"),
        "{usage}"
    );
    assert_eq!(usage.matches("\n    \t").count(), SPECS.len());
}

#[test]
fn every_flag_sets_what_it_is_named_for_and_nothing_else() {
    let mut seen = Vec::new();
    for spec in &SPECS {
        let value = match spec.kind {
            Kind::Bool(_) => "true",
            Kind::Number(_) => "7",
            _ => "v",
        };
        let given = words(&[&format!("-{}={value}", spec.name)]).unwrap();
        assert_ne!(given, Flags::default(), "{}", spec.name);
        // The field is the flag's name in the other spelling.
        let field: String = spec
            .name
            .chars()
            .filter(|c| *c != '-')
            .flat_map(char::to_lowercase)
            .collect();
        let shown = format!("{given:?}");
        let default = format!("{:?}", Flags::default());
        let differs: Vec<&str> = shown.split(", ").filter(|part| !default.contains(part)).collect();
        assert_eq!(differs.len(), 1, "{differs:?}");
        let name = differs[0]
            .trim_start_matches("Flags { ")
            .split(':')
            .next()
            .unwrap();
        assert_eq!(name.replace('_', ""), field);
        assert!(!seen.contains(&spec.name));
        seen.push(spec.name);
    }
}

#[test]
fn paths_may_be_any_bytes_and_text_may_not() {
    let odd = |flag: &[u8]| OsString::from_vec([flag, b"\xff"].concat());

    let given = Flags::parse([odd(b"-log-file=")]).unwrap();
    assert_eq!(given.log_file.unwrap().as_os_str().as_bytes(), b"\xff");

    let refused = Flags::parse([odd(b"-listen=")]).unwrap_err().to_string();
    assert!(
        refused.starts_with("invalid value \"\\xFF\" for flag -listen: not UTF-8"),
        "{refused}"
    );
    assert!(
        Flags::parse([odd(b"-x")])
            .unwrap_err()
            .to_string()
            .starts_with("flag provided but not defined")
    );
}

#[test]
fn numbers_are_gos() {
    for (text, number) in [
        ("0", 0),
        ("-0", 0),
        ("+5", 5),
        ("0b101", 5),
        ("0o17", 15),
        ("017", 15),
        ("0_7", 7),
        ("0X_fF", 255),
        ("-9223372036854775808", i64::MIN),
    ] {
        assert_eq!(go_number(text), Ok(number), "{text}");
    }
    for text in [
        "", "-", "+", "--1", "0x", "0x_", "_1", "1_", "1__0", "08", "1 ", " 1", "0b2", "\u{661}", "0é",
    ] {
        assert_eq!(go_number(text), Err(NumberError::Syntax), "{text}");
    }
    assert_eq!(go_number("0x8000000000000000"), Err(NumberError::Range));
}
