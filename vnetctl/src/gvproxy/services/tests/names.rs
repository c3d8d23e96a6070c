//! Zones, leases, and who is there.

use vnet_proto::v1;

use super::world::World;
use super::*;

const ALL: &str = "/services/dns/all";
const ADD: &str = "/services/dns/add";
const SERVICES: Origin = Origin::Services;

#[tokio::test]
async fn zones_are_added_to_as_gvproxy_does_and_listed_in_its_shape() {
    let world = World::start().await;
    let _one = world.dataplane("one", v1::Mode::Unspecified).await;
    let _two = world.dataplane("two", v1::Mode::Unspecified).await;
    let services = world.services("one");
    assert_eq!(get(&services, SERVICES, ALL).await, (200, "[]\n".to_owned()));
    for body in [
        r#"{"Name":"crc.testing.","Records":[{"Name":"host","IP":"192.168.127.254"}],"DefaultIP":"192.168.127.2"}"#,
        r#"{"name":"apps.crc.testing","defaultip":"192.168.127.2"}"#,
        r#"{"Name":"crc.testing.","Records":[{"Name":"api","IP":"192.168.127.2"},{"name":"up"}]}"#,
    ] {
        assert_eq!(post(&services, SERVICES, ADD, body).await, done(), "{body}");
    }

    let all = get(&services, SERVICES, ALL).await;

    assert_eq!(
        all.1,
        "[{\"Name\":\"crc.testing.\",\"Records\":[{\"Name\":\"api\",\"IP\":\"192.168.127.2\"},\
         {\"Name\":\"up\",\"IP\":\"\"},{\"Name\":\"host\",\"IP\":\"192.168.127.254\"}],\"DefaultIP\":\"\"},\
         {\"Name\":\"apps.crc.testing.\",\"Records\":null,\"DefaultIP\":\"192.168.127.2\"}]\n"
    );
    assert_eq!(get(&world.services("two"), SERVICES, ALL).await.1, "[]\n");
}

#[tokio::test]
async fn records_by_expression_are_added_and_listed_and_the_root_has_no_name() {
    let world = World::start().await;
    let _dataplane = world.dataplane("one", v1::Mode::Unspecified).await;
    let services = world.services("one");
    for body in [
        r#"{"Name":"crc.testing.","Records":[{"Regexp":"^a.*<x>$","IP":"192.168.127.2"}]}"#,
        r#"{"Name":"","Records":[{"name":"example.com","ip":"192.0.2.1"}],"DefaultIP":"192.0.2.2"}"#,
    ] {
        assert_eq!(post(&services, SERVICES, ADD, body).await, done(), "{body}");
    }
    assert_eq!(
        get(&services, SERVICES, ALL).await.1,
        "[{\"Name\":\"crc.testing.\",\"Records\":[{\"Name\":\"\",\"IP\":\"192.168.127.2\",\
         \"Regexp\":\"^a.*\\u003cx\\u003e$\"}],\"DefaultIP\":\"\"},\
         {\"Name\":\"\",\"Records\":[{\"Name\":\"example.com\",\"IP\":\"192.0.2.1\"}],\
         \"DefaultIP\":\"192.0.2.2\"}]\n"
    );
    let (status, text) = post(
        &services,
        SERVICES,
        ADD,
        r#"{"Name":"a.","Records":[{"Regexp":"(","IP":"192.0.2.1"}]}"#,
    )
    .await;
    assert_eq!(status, 400, "{text}");
    assert_eq!(
        post(
            &services,
            SERVICES,
            ADD,
            r#"{"Name":"a.","Records":[{"Regexp":1}]}"#
        )
        .await,
        refused(
            400,
            "json: cannot unmarshal number into Go struct field Zone.Records.Regexp of type *regexp.Regexp"
        )
    );
}

#[tokio::test]
async fn zones_and_records_are_removed() {
    let world = World::start().await;
    let _dataplane = world.dataplane("one", v1::Mode::Unspecified).await;
    let services = world.services("one");
    let zone = r#"{"Name":"a.test.","Records":[{"Name":"x","IP":"192.0.2.1"},{"Name":"x","IP":"192.0.2.2"},
        {"Name":"y","IP":"192.0.2.3"}]}"#;
    assert_eq!(post(&services, SERVICES, ADD, zone).await, done());
    let record = "/services/dns/remove/record";
    let steps = [
        (
            r#"{"name":"a.test.","record":{"Name":"x","IP":"192.0.2.2"}}"#,
            done(),
        ),
        (
            r#"{"name":"a.test.","record":{"Name":"x","IP":"192.0.2.2"}}"#,
            refused(400, "record not found"),
        ),
        (r#"{"name":"A.test","record":{"name":"y"}}"#, done()),
        (
            r#"{"name":"b.test.","record":{"Name":"x"}}"#,
            refused(400, "zone not found"),
        ),
        (
            r#"{"record":{"Name":"x"}}"#,
            refused(400, "name is required (the zone that every name is in is \".\")"),
        ),
        (r#"{"name":"a.test."}"#, refused(400, "record name is required")),
        (
            r#"{"name":"a.test.","record":{"Name":"x","IP":"x"}}"#,
            refused(400, "invalid IP address: x"),
        ),
    ];
    for (body, expected) in steps {
        assert_eq!(post(&services, SERVICES, record, body).await, expected, "{body}");
    }
    assert!(
        get(&services, SERVICES, ALL)
            .await
            .1
            .contains("[{\"Name\":\"x\",\"IP\":\"192.0.2.1\"}]")
    );
    let remove = "/services/dns/remove";
    assert_eq!(
        post(&services, SERVICES, remove, r#"{"Name":""}"#).await,
        refused(400, "name is required (the zone that every name is in is \".\")")
    );
    // What was added without a name can be removed.
    assert_eq!(post(&services, SERVICES, "/services/dns/add", "{}").await, done());
    assert_eq!(post(&services, SERVICES, remove, r#"{"Name":"."}"#).await, done());
    assert_eq!(
        post(&services, SERVICES, remove, r#"{"Name":"a.test."}"#).await,
        done()
    );
    assert_eq!(
        post(&services, SERVICES, remove, r#"{"Name":"a.test."}"#).await,
        refused(404, "zone not found")
    );
    assert_eq!(get(&services, SERVICES, ALL).await.1, "[]\n");
}

#[tokio::test]
async fn zones_that_are_none_are_refused() {
    let world = World::start().await;
    let _dataplane = world.dataplane("one", v1::Mode::Unspecified).await;
    let services = world.services("one");
    let cases = [
        ("", "EOF"),
        (
            "[]",
            "json: cannot unmarshal array into Go value of type types.Zone",
        ),
        (r#"{"Name":"a.","DefaultIP":"x"}"#, "invalid IP address: x"),
        (
            r#"{"Name":"a.","DefaultIP":1}"#,
            "json: cannot unmarshal number into Go struct field Zone.DefaultIP of type net.IP",
        ),
        (
            r#"{"Name":"a.","Records":{}}"#,
            "json: cannot unmarshal object into Go struct field Zone.Records of type []types.Record",
        ),
    ];
    for (body, text) in cases {
        assert_eq!(
            post(&services, SERVICES, ADD, body).await,
            refused(400, text),
            "{body}"
        );
    }
    let (status, text) = post(&services, SERVICES, ADD, r#"{"Name":"a b."}"#).await;
    assert_eq!(status, 400, "{text}");
    assert!(text.starts_with("zone.name: "), "{text}");
    assert_eq!(get(&services, SERVICES, ADD).await, refused(400, "post only"));
}

#[tokio::test]
async fn many_who_add_to_one_zone_at_once_lose_nothing() {
    let world = World::start().await;
    let _dataplane = world.dataplane("one", v1::Mode::Unspecified).await;
    let services = world.services("one");
    let mut adding = tokio::task::JoinSet::new();
    for number in 0..16 {
        let services = Arc::clone(&services);
        adding.spawn(async move {
            let body = format!(r#"{{"Name":"a.test.","Records":[{{"Name":"n{number}","IP":"192.0.2.1"}}]}}"#);
            assert_eq!(post(&services, SERVICES, ADD, &body).await, done());
        });
    }
    while let Some(added) = adding.join_next().await {
        added.unwrap();
    }
    let all = get(&services, SERVICES, ALL).await.1;
    for number in 0..16 {
        assert!(all.contains(&format!("\"n{number}\"")), "{number}: {all}");
    }
}

#[tokio::test]
async fn leases_and_who_is_connected_are_told_of_this_network() {
    let world = World::start().await;
    let _one = world.dataplane("one", v1::Mode::Unspecified).await;
    let services = world.services("one");
    let leases = "{\"192.168.127.1\":\"5a:94:ef:e4:0c:dd\",\"192.168.127.2\":\"5a:94:ef:e4:0c:ee\",\
                  \"192.168.127.9\":\"5a:94:ef:e4:0c:09\"}\n";
    for path in ["/leases", "/services/dhcp/leases"] {
        assert_eq!(get(&services, SERVICES, path).await, (200, leases.to_owned()));
    }
    assert_eq!(
        get(&services, SERVICES, "/cam").await,
        (200, "{\"5a:94:ef:e4:0c:ee\":0}\n".to_owned())
    );
    let other = world.services("two");
    assert_eq!(get(&other, SERVICES, "/cam").await, (200, "{}\n".to_owned()));
    assert!(!get(&other, SERVICES, "/leases").await.1.contains("127.2\""));
    let (status, stats) = get(&services, SERVICES, "/stats").await;
    let stats: serde_json::Value = serde_json::from_str(&stats).unwrap();
    assert_eq!(
        (status, &stats["TCP"]["CurrentEstablished"]),
        (200, &serde_json::json!(0))
    );
}
