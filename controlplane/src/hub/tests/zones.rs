//! Zones as the controlplane knows them: what a dataplane acknowledged, in its order.

use super::*;
use vnet_proto::v1::command::Command;

fn zone(name: &str, records: &[(&str, &str)]) -> v1::Zone {
    v1::Zone {
        network: "net1".to_owned(),
        name: name.to_owned(),
        records: records
            .iter()
            .map(|(name, address)| v1::ZoneRecord {
                name: (*name).to_owned(),
                address: (*address).to_owned(),
                regexp: String::new(),
            })
            .collect(),
        default_address: String::new(),
    }
}

#[tokio::test]
async fn a_zone_that_was_added_to_is_known_as_the_dataplane_says_and_in_its_place() {
    let rig = Rig::open();
    let mut dp = rig.dataplane_with(v1::Hello {
        zones: vec![zone("a.test", &[("old", "10.0.0.1")]), zone("b.test", &[])],
        ..hello(1, vec![vm_up(1, "web")])
    });
    let mut change = async |command: Command, ack: v1::Ack| {
        let hub = std::sync::Arc::clone(&rig.hub);
        let call = tokio::spawn(async move { hub.command("net1", |_| command).await });
        let command_id = loop {
            tokio::task::yield_now().await;
            if let Some(Told::Command(command)) = dp.told().pop() {
                break command.command_id;
            }
        };
        dp.say(Message::Ack(v1::Ack { command_id, ..ack }));
        call.await.unwrap()
    };
    let is = |zone: v1::Zone| v1::Ack {
        zone: Some(v1::Zone {
            network: String::new(),
            ..zone
        }),
        ..Default::default()
    };

    let merged = zone("a.test", &[("new", "10.0.0.2"), ("old", "10.0.0.1")]);
    let added = Command::MergeZone(zone("a.test", &[("new", "10.0.0.2")]));
    change(added, is(merged.clone())).await.unwrap();
    assert_eq!(rig.hub.zones("").unwrap(), [merged.clone(), zone("b.test", &[])]);

    let refused = v1::Ack {
        error: Some(v1::CommandError {
            code: 5,
            text: "zone b.test has no such record".to_owned(),
            ..Default::default()
        }),
        ..Default::default()
    };
    let removed = Command::RemoveRecords(zone("b.test", &[("x", "")]));
    let refusal = change(removed, refused).await.unwrap_err();
    assert!(
        matches!(refusal, Refusal::Dataplane { code: 5, .. }),
        "{refusal:?}"
    );
    assert_eq!(
        rig.hub.zones("").unwrap(),
        [merged, zone("b.test", &[])],
        "nothing is changed"
    );

    let left = zone("a.test", &[("old", "10.0.0.1")]);
    let removed = Command::RemoveRecords(zone("a.test", &[("new", "")]));
    change(removed, is(left.clone())).await.unwrap();
    change(Command::DeleteZone(zone("b.test", &[])), v1::Ack::default())
        .await
        .unwrap();
    assert_eq!(rig.hub.zones("net1").unwrap(), [left]);
}
