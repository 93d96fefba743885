// Package byokeep seals provider keys and calls byokeep from Go.
//
// It is an example that is tested, small enough to be copied: a connection over mutual TLS, the
// intake statement verified against the pinned trust bundle, the seal of docs/sealing.md with the
// standard library's crypto/hpke. The stubs beside it are made by `buf generate`.
package byokeep

import (
	"context"
	"crypto/ed25519"
	"crypto/hpke"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"strings"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/protobuf/proto"

	commonv1 "byokeep.dev/go/common/v1"
	keyvaultv1 "byokeep.dev/go/keyvault/v1"
	orchestratorv1 "byokeep.dev/go/orchestrator/v1"
)

const (
	intakePayloadType = "application/vnd.byokeep.intake-key.v1+protobuf"
	sealLabel         = "byokeep/intake/v1"
	skew              = 2 * time.Minute
	maxWindow         = time.Hour
)

// Suite is the suite that Seal asks for: ML-KEM-768 with X25519.
const Suite = commonv1.HpkeSuite_HPKE_SUITE_MLKEM768_X25519_V1

// ErrUntrusted is returned for an intake statement that is not to be believed.
var ErrUntrusted = errors.New("intake statement refused")

// Trust is what a client believes: trust.json.
type Trust struct {
	Deployment        string            `json:"deployment"`
	CA                []string          `json:"ca"`
	IntakeSigningKeys map[string]string `json:"intake_signing_keys"`
}

// LoadTrust reads trust.json.
func LoadTrust(path string) (*Trust, error) {
	data, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	trust := new(Trust)
	if err := json.Unmarshal(data, trust); err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	if trust.Deployment == "" || len(trust.CA) == 0 {
		return nil, fmt.Errorf("%s: a trust bundle has a deployment and CA certificates", path)
	}
	return trust, nil
}

// Dial opens a connection over mutual TLS 1.3. The server's certificate must come from a CA of
// the trust bundle and have the name serverName, whatever address is dialled.
func Dial(address, serverName, certificate, key string, trust *Trust) (*grpc.ClientConn, error) {
	identity, err := tls.LoadX509KeyPair(certificate, key)
	if err != nil {
		return nil, err
	}
	pool := x509.NewCertPool()
	for _, authority := range trust.CA {
		if !pool.AppendCertsFromPEM([]byte(authority)) {
			return nil, errors.New("the trust bundle has a CA that is not PEM")
		}
	}
	return grpc.NewClient(address, grpc.WithTransportCredentials(credentials.NewTLS(&tls.Config{
		Certificates: []tls.Certificate{identity},
		RootCAs:      pool,
		ServerName:   serverName,
		MinVersion:   tls.VersionTLS13,
	})))
}

// Context is everything that a seal is bound to.
type Context struct {
	Tenant, Owner, Provider, KeyID, Operation, RequestID string
}

// Info is HPKE's info: nine fields, each after its length.
func (c Context) Info(deployment, intakeKeyID string) []byte {
	var info []byte
	for _, field := range []string{
		sealLabel, deployment, intakeKeyID, c.Tenant, c.Owner, c.Provider, c.KeyID, c.Operation, c.RequestID,
	} {
		info = binary.BigEndian.AppendUint32(info, uint32(len(field)))
		info = append(info, field...)
	}
	return info
}

// Seal gets an intake key, checks who says so, and seals a provider key to it.
func Seal(
	ctx context.Context, keys orchestratorv1.KeyServiceClient, trust *Trust, c Context, key string,
) (*keyvaultv1.SealedKey, error) {
	if err := CheckKey(key); err != nil {
		return nil, err
	}
	answer, err := keys.GetIntakeKey(ctx, &orchestratorv1.GetIntakeKeyRequest{
		Parent: "tenants/" + c.Tenant, Suite: Suite,
	})
	if err != nil {
		return nil, err
	}
	statement, err := VerifyStatement(answer.GetStatement(), trust, Suite, time.Now())
	if err != nil {
		return nil, err
	}
	return SealTo(statement, c, key)
}

// CheckKey refuses what can't be a provider's key. It is the least of docs/sealing.md's fourth
// part; docs/vectors/key-shapes-v1.json has the rest, which keyvault applies too.
func CheckKey(key string) error {
	if len(key) < 16 || len(key) > 512 {
		return fmt.Errorf("a provider key has 16 to 512 characters; this has %d", len(key))
	}
	if strings.IndexFunc(key, func(r rune) bool { return r < '!' || r > '~' }) >= 0 {
		return errors.New("a provider key has printable ASCII characters only")
	}
	return nil
}

// VerifyStatement returns the statement that a pinned key signed for this deployment, suite and
// time. The payload is parsed only after its signature is verified.
func VerifyStatement(
	envelope *commonv1.SignedEnvelope, trust *Trust, suite commonv1.HpkeSuite, now time.Time,
) (*keyvaultv1.IntakeStatement, error) {
	if envelope.GetPayloadType() != intakePayloadType {
		return nil, fmt.Errorf("%w: it is a statement of another type", ErrUntrusted)
	}
	pinned, known := trust.IntakeSigningKeys[envelope.GetKeyId()]
	public, err := base64.StdEncoding.DecodeString(pinned)
	if !known || err != nil || len(public) != ed25519.PublicKeySize {
		return nil, fmt.Errorf("%w: its signing key is not pinned", ErrUntrusted)
	}
	if !ed25519.Verify(public, signedBytes(envelope), envelope.GetSignature()) {
		return nil, fmt.Errorf("%w: its signature does not verify", ErrUntrusted)
	}
	statement := new(keyvaultv1.IntakeStatement)
	if err := proto.Unmarshal(envelope.GetPayload(), statement); err != nil {
		return nil, fmt.Errorf("%w: %v", ErrUntrusted, err)
	}
	start, end := statement.GetNotBefore().AsTime(), statement.GetNotAfter().AsTime()
	switch {
	case statement.GetDeployment() != trust.Deployment:
		return nil, fmt.Errorf("%w: it is for another deployment", ErrUntrusted)
	case now.Before(start.Add(-skew)) || now.After(end) || end.Sub(start) > maxWindow:
		return nil, fmt.Errorf("%w: its window is not now", ErrUntrusted)
	case statement.GetSuite() != suite:
		return nil, fmt.Errorf("%w: it is for another suite than was asked for", ErrUntrusted)
	}
	return statement, nil
}

func signedBytes(envelope *commonv1.SignedEnvelope) []byte {
	kind, payload := envelope.GetPayloadType(), envelope.GetPayload()
	return fmt.Appendf(nil, "DSSEv1 %d %s %d %s", len(kind), kind, len(payload), payload)
}

// SealTo seals a provider key to the intake key of a statement that was verified.
func SealTo(statement *keyvaultv1.IntakeStatement, c Context, key string) (*keyvaultv1.SealedKey, error) {
	kem, err := kemOf(statement.GetSuite())
	if err != nil {
		return nil, err
	}
	public, err := kem.NewPublicKey(statement.GetPublicKey())
	if err != nil {
		return nil, err
	}
	info := c.Info(statement.GetDeployment(), statement.GetIntakeKeyId())
	ciphertext, err := hpke.Seal(public, hpke.HKDFSHA256(), hpke.AES256GCM(), info, []byte(key))
	if err != nil {
		return nil, err
	}
	return &keyvaultv1.SealedKey{
		IntakeKeyId: statement.GetIntakeKeyId(), Suite: statement.GetSuite(), Ciphertext: ciphertext,
	}, nil
}

func kemOf(suite commonv1.HpkeSuite) (hpke.KEM, error) {
	switch suite {
	case commonv1.HpkeSuite_HPKE_SUITE_X25519_V1:
		return hpke.NewKEM(0x0020)
	case commonv1.HpkeSuite_HPKE_SUITE_MLKEM768_X25519_V1:
		return hpke.MLKEM768X25519(), nil
	}
	return nil, fmt.Errorf("suite %v is not supported", suite)
}

// NewID returns a fresh id such as key_01k…: a ULID in lower case after its kind.
func NewID(kind string) string {
	const alphabet = "0123456789abcdefghjkmnpqrstvwxyz"
	var raw [16]byte
	binary.BigEndian.PutUint64(raw[:8], uint64(time.Now().UnixMilli())<<16)
	if _, err := rand.Read(raw[6:]); err != nil {
		panic(err) // crypto/rand does not fail
	}
	high, low := binary.BigEndian.Uint64(raw[:8]), binary.BigEndian.Uint64(raw[8:])
	digits := make([]byte, 26)
	for at := len(digits) - 1; at >= 0; at-- {
		digits[at] = alphabet[low&31]
		low = low>>5 | high<<59
		high >>= 5
	}
	return kind + "_" + string(digits)
}
