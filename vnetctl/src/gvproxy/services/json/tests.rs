//! Bodies as programs send them, and Go's words for those that are wrong.

use super::*;

fn read(body: &str) -> Result<Json, String> {
    Json::read(body.as_bytes())
}

#[test]
fn what_is_no_json_is_told_in_gos_words() {
    let cases = [
        ("", "EOF"),
        (" \n", "EOF"),
        ("{", "unexpected EOF"),
        (r#"{"local":"#, "unexpected EOF"),
        (r#"{"local":":1""#, "unexpected EOF"),
        (
            "local=:6443",
            "invalid character 'l' looking for beginning of value",
        ),
        (
            "{'a':1}",
            r"invalid character '\'' looking for beginning of object key string",
        ),
        (
            r#"{"a":1,}"#,
            "invalid character '}' looking for beginning of object key string",
        ),
        (r#"{"a" 1}"#, "invalid character '1' after object key"),
        (
            r#"{"a":1 "b":2}"#,
            "invalid character '\"' after object key:value pair",
        ),
        ("[1 2]", "invalid character '2' after array element"),
        (
            r#"{"a":[1,{"b":]}]}"#,
            "invalid character ']' looking for beginning of value",
        ),
        ("tru!", "invalid character '!' in literal true (expecting 'e')"),
        ("nil", "invalid character 'i' in literal null (expecting 'u')"),
        ("falsy", "invalid character 'y' in literal false (expecting 'e')"),
        ("-x", "invalid character 'x' in numeric literal"),
        (
            "1.x",
            "invalid character 'x' after decimal point in numeric literal",
        ),
        ("1e+x", "invalid character 'x' in exponent of numeric literal"),
        (r#""\x""#, "invalid character 'x' in string escape code"),
        (
            r#""\u00g0""#,
            r"invalid character 'g' in \u hexadecimal character escape",
        ),
        ("\"a\nb\"", r"invalid character '\n' in string literal"),
        (
            "\u{1}",
            r"invalid character '\x01' looking for beginning of value",
        ),
    ];
    for (body, expected) in cases {
        assert_eq!(read(body).unwrap_err(), expected, "{body:?}");
    }
    let bytes = Json::read(b"\xff").unwrap_err();
    assert!(bytes.ends_with("looking for beginning of value"), "{bytes}");
}

/// Go says so of the first bracket beyond its limit, whether or not what follows is JSON (`scanner.go`,
/// `pushParseState`).
#[test]
fn brackets_without_end_are_refused_in_gos_words_and_take_no_stack() {
    let list = "invalid character '[' exceeded max depth";
    assert_eq!(read(&"[".repeat(1 << 20)).unwrap_err(), list);
    assert_eq!(read(&"[".repeat(10_001)).unwrap_err(), list);
    assert_eq!(read(&"[".repeat(10_000)).unwrap_err(), "unexpected EOF");
    assert_eq!(
        read(&"{\"a\":".repeat(10_001)).unwrap_err(),
        "invalid character '{' exceeded max depth"
    );
    // Well formed, and more than is read here.
    let nested = |depth| format!("{}{}", "[".repeat(depth), "]".repeat(depth));
    assert!(read(&nested(127)).is_ok());
    assert_eq!(read(&nested(128)).unwrap_err(), list);
    assert_eq!(
        read("1e999").unwrap_err(),
        "json: cannot unmarshal number into Go value of type float64"
    );
}

/// As Go's `unquote` does.
#[test]
fn half_a_character_is_the_one_for_what_is_none() {
    for (body, expected) in [
        (r#""\ud800""#, "\u{fffd}"),
        (r#""a\uDC00b""#, "a\u{fffd}b"),
        (r#""\ud800\ud800\udc00""#, "\u{fffd}\u{10000}"),
        (r#""\ud83d\ude00""#, "\u{1f600}"),
        (r#""\ud800\n""#, "\u{fffd}\n"),
        (r#""\\ud800""#, "\\ud800"),
        (r#""\u00e4\\\udfff""#, "\u{e4}\\\u{fffd}"),
    ] {
        assert_eq!(read(body), Ok(Json::Text(expected.to_owned())), "{body}");
    }
    // What is wrong is told where it stands, as before.
    assert_eq!(
        read(r#""\ud800\xé""#).unwrap_err(),
        "invalid character 'x' in string escape code"
    );
    assert_eq!(read(r#""\"#).unwrap_err(), "unexpected EOF");
    assert_eq!(read(r#""\ud8"#).unwrap_err(), "unexpected EOF");
}

#[test]
fn keys_have_no_case_the_last_counts_and_what_follows_is_not_looked_at() {
    let value = read(r#"{"LOCAL":":1","local":":2","extra":[{}],"Remote":null} and more"#).unwrap();
    let object = Object::of(&value, "ExposeRequest").unwrap();

    assert_eq!(object.text("local").unwrap(), ":2");
    assert_eq!(object.text("remote").unwrap(), "");
    assert_eq!(object.text("protocol").unwrap(), "");
    assert_eq!(read("null").map(|v| Object::of(&v, "X").is_ok()), Ok(true));
}

#[test]
fn values_of_another_kind_are_named_with_their_place() {
    let of = |body: &str| {
        let value = read(body).unwrap();
        let object = Object::of(&value, "Zone")?;
        object.text("Name")?;
        object.integer("port")?;
        for record in object.list("Records", "types.Record")? {
            record.text("IP")?;
        }
        object.object("Record", "types.Record")?.text("Name")
    };
    let cases = [
        (
            "[]",
            "json: cannot unmarshal array into Go value of type types.Zone",
        ),
        (
            "7",
            "json: cannot unmarshal number into Go value of type types.Zone",
        ),
        (
            r#"{"name":7}"#,
            "json: cannot unmarshal number into Go struct field Zone.Name of type string",
        ),
        (
            r#"{"port":"80"}"#,
            "json: cannot unmarshal string into Go struct field Zone.port of type int",
        ),
        (
            r#"{"port":80.5}"#,
            "json: cannot unmarshal number into Go struct field Zone.port of type int",
        ),
        (
            r#"{"records":{}}"#,
            "json: cannot unmarshal object into Go struct field Zone.Records of type []types.Record",
        ),
        (
            r#"{"records":[{"ip":true}]}"#,
            "json: cannot unmarshal bool into Go struct field Zone.Records.IP of type string",
        ),
        (
            r#"{"record":{"name":[]}}"#,
            "json: cannot unmarshal array into Go struct field Zone.Record.Name of type string",
        ),
    ];
    for (body, expected) in cases {
        assert_eq!(of(body).unwrap_err(), expected, "{body}");
    }
}

#[test]
fn text_is_escaped_as_go_does() {
    assert_eq!(
        write(&"ssh-tunnel://a@b/c?key=k&x=<y>\u{2028}\u{1}\"\n"),
        "\"ssh-tunnel://a@b/c?key=k\\u0026x=\\u003cy\\u003e\\u2028\\u0001\\\"\\n\"\n"
    );
}
