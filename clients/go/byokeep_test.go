package byokeep

import (
	"crypto/hpke"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"errors"
	"os"
	"regexp"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"

	commonv1 "byokeep.dev/go/common/v1"
	keyvaultv1 "byokeep.dev/go/keyvault/v1"
)

type vectors struct {
	Seals []struct {
		Suite, Deployment, Tenant, Owner, Provider, Operation, Info, Plaintext, Sealed, Seed string
		PrivateKey                                                                           string `json:"private_key"`
		PublicKey                                                                            string `json:"public_key"`
		IntakeKeyID                                                                          string `json:"intake_key_id"`
		KeyID                                                                                string `json:"key_id"`
		RequestID                                                                            string `json:"request_id"`
	}
	Statements []struct {
		Suite, Payload, Signature string
		SigningPublicKey          string    `json:"signing_public_key"`
		KeyID                     string    `json:"key_id"`
		PayloadType               string    `json:"payload_type"`
		SignedBytes               string    `json:"signed_bytes"`
		NotBefore                 time.Time `json:"not_before"`
	}
}

func load(t *testing.T) vectors {
	t.Helper()
	data, err := os.ReadFile("../../docs/vectors/seal-v1.json")
	if err != nil {
		t.Fatal(err)
	}
	var found vectors
	if err := json.Unmarshal(data, &found); err != nil {
		t.Fatal(err)
	}
	if len(found.Seals) < 4 || len(found.Statements) < 2 {
		t.Fatal("the vectors are not whole")
	}
	return found
}

func unhex(t *testing.T, text string) []byte {
	t.Helper()
	raw, err := hex.DecodeString(text)
	if err != nil {
		t.Fatal(err)
	}
	return raw
}

func suiteOf(name string) commonv1.HpkeSuite {
	return commonv1.HpkeSuite(commonv1.HpkeSuite_value[name])
}

func TestThePublishedSealsOpenAndOursOpensAlike(t *testing.T) {
	for _, vector := range load(t).Seals {
		suite := suiteOf(vector.Suite)
		kem, err := kemOf(suite)
		if err != nil {
			t.Fatal(err)
		}
		raw := vector.PrivateKey
		if vector.Seed != "" {
			raw = vector.Seed
		}
		private, err := kem.NewPrivateKey(unhex(t, raw))
		if err != nil {
			t.Fatal(err)
		}
		if hex.EncodeToString(private.PublicKey().Bytes()) != vector.PublicKey {
			t.Error(vector.Suite, "the seed has another public key")
		}
		c := Context{vector.Tenant, vector.Owner, vector.Provider, vector.KeyID, vector.Operation, vector.RequestID}
		info := c.Info(vector.Deployment, vector.IntakeKeyID)
		if hex.EncodeToString(info) != vector.Info {
			t.Error(vector.Suite, "info differs")
		}
		opened, err := hpke.Open(private, hpke.HKDFSHA256(), hpke.AES256GCM(), info, unhex(t, vector.Sealed))
		if err != nil || string(opened) != vector.Plaintext {
			t.Error(vector.Suite, err, string(opened))
		}
		statement := &keyvaultv1.IntakeStatement{
			Deployment: vector.Deployment, IntakeKeyId: vector.IntakeKeyID, Suite: suite,
			PublicKey: unhex(t, vector.PublicKey),
		}
		sealed, err := SealTo(statement, c, vector.Plaintext)
		if err != nil {
			t.Fatal(err)
		}
		opened, err = hpke.Open(private, hpke.HKDFSHA256(), hpke.AES256GCM(), info, sealed.GetCiphertext())
		if err != nil || string(opened) != vector.Plaintext {
			t.Error(vector.Suite, "ours does not open", err)
		}
	}
}

func TestAStatementIsBelievedOnlyAsItWasPinned(t *testing.T) {
	for _, vector := range load(t).Statements {
		suite, now := suiteOf(vector.Suite), vector.NotBefore.Add(time.Minute)
		pinned := base64.StdEncoding.EncodeToString(unhex(t, vector.SigningPublicKey))
		trust := &Trust{Deployment: "example", IntakeSigningKeys: map[string]string{vector.KeyID: pinned}}
		envelope := &commonv1.SignedEnvelope{
			PayloadType: vector.PayloadType, Payload: unhex(t, vector.Payload),
			KeyId: vector.KeyID, Signature: unhex(t, vector.Signature),
		}
		if hex.EncodeToString(signedBytes(envelope)) != vector.SignedBytes {
			t.Error("other bytes are signed")
		}
		statement, err := VerifyStatement(envelope, trust, suite, now)
		if err != nil || statement.GetSuite() != suite {
			t.Fatal(err)
		}
		forged := proto.Clone(envelope).(*commonv1.SignedEnvelope)
		forged.Signature[0] ^= 1 // all else is right: nothing but the signature tells
		other := proto.Clone(envelope).(*commonv1.SignedEnvelope)
		other.PayloadType = "application/vnd.byokeep.grant.v1+protobuf"
		unpinned := &Trust{Deployment: "example"}
		elsewhere := &Trust{Deployment: "another", IntakeSigningKeys: trust.IntakeSigningKeys}
		weaker := commonv1.HpkeSuite_HPKE_SUITE_UNSPECIFIED
		for what, refused := range map[string]func() (*keyvaultv1.IntakeStatement, error){
			"forged":     func() (*keyvaultv1.IntakeStatement, error) { return VerifyStatement(forged, trust, suite, now) },
			"type":       func() (*keyvaultv1.IntakeStatement, error) { return VerifyStatement(other, trust, suite, now) },
			"unpinned":   func() (*keyvaultv1.IntakeStatement, error) { return VerifyStatement(envelope, unpinned, suite, now) },
			"deployment": func() (*keyvaultv1.IntakeStatement, error) { return VerifyStatement(envelope, elsewhere, suite, now) },
			"suite":      func() (*keyvaultv1.IntakeStatement, error) { return VerifyStatement(envelope, trust, weaker, now) },
			"over": func() (*keyvaultv1.IntakeStatement, error) {
				return VerifyStatement(envelope, trust, suite, now.Add(2*time.Hour))
			},
			"not yet": func() (*keyvaultv1.IntakeStatement, error) {
				return VerifyStatement(envelope, trust, suite, now.Add(-time.Hour))
			},
		} {
			if _, err := refused(); !errors.Is(err, ErrUntrusted) {
				t.Errorf("%s: %v", what, err)
			}
		}
	}
}

func TestIDsHaveTheFormThatTheServiceTakes(t *testing.T) {
	form := regexp.MustCompile(`^key_[0-9a-z]{26}$`)
	first, second := NewID("key"), NewID("key")
	if !form.MatchString(first) || first == second {
		t.Error(first, second)
	}
}
